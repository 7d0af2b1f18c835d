"""Gram matrices: how far rounding may take a norm that they give, and when that is too far.

`sum_ts (l_t . l_s)(r_t . r_s)` is the squared norm of `sum_t l_t r_t^T` without forming it. Its terms may cancel, so a
bound on the rounding error is added, and a norm is found in another way where its bound is not small. Each row is
judged alone: no row's norm depends on what the others of its batch are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from privet.gradients.precision import Kind, product_error
from privet.gradients.rows import lost, raised

__all__ = ["NARROW", "gram_padding", "never_too_small"]

NARROW = 2e-4
"""How much of a squared norm the bound on its rounding error may be."""

_NOTHING = 1e-20
"""A bound on a squared norm below this is added unasked: it makes norms below 1e-10 too large, and no others."""


def gram_padding(length: int, dtype: torch.dtype, device: torch.device, *, kind: Kind = "matmul") -> float:
    """Returns the relative rounding error of a product of two inner products of at most `length` terms."""
    return 2.0 * product_error(max(length, 16), dtype, device, kind=kind)  # 16, for the double sum that follows


def never_too_small(
    gram: Tensor,  # (R,): the squared norms as the Gram matrices gave them
    lengths: tuple[Tensor, Tensor],  # (R, T) each: the norms of the vectors l and r
    entries: tuple[int, int],  # of one l and of one r
    *,
    terms: int,  # that one inner product adds up at once
    again: Callable[[Tensor], Tensor],  # (R',) int -> (R',)
    kind: Kind = "matmul",
) -> Tensor:  # (R,)
    """Returns the squared norms plus a bound on their rounding error and on what underflow took.

    Where the bound is more than `NARROW` of a norm, `again` finds that norm, from the indices of such rows: by a sum of
    squares, with a padding of its own. A bound below `_NOTHING` is not asked: rows of zeros have one.

    An inner product of n terms loses at most `lost(n)` to underflow, and so does the square of each length. The lengths
    are raised until the share of their products that is added is more than all of that, whatever it is multiplied by:
    `share (sum_t (|l_t| + e) |r_t|)^2` is at least `share e^2 (sum_t |r_t|)^2`. Products of inner products underflow,
    too. That matters only where the sum is next to nothing, and there it is raised.
    """
    share = gram_padding(terms, gram.dtype, gram.device, kind=kind)
    left, right = (
        raised(t, math.sqrt(4.0 * lost(n, gram.dtype) / share)) for t, n in zip(lengths, entries, strict=True)
    )
    padding = (left * right).sum(1).square() * share
    norms: Tensor = gram.clamp(min=1e5 * lost(left.shape[1] ** 2, gram.dtype)) + padding
    # Rows that are not finite are dropped later, whatever their norm.
    unsure = (padding > NARROW * gram + _NOTHING) & gram.isfinite() & padding.isfinite()
    if bool(unsure.any()):
        rows = unsure.nonzero()[:, 0]
        norms.index_copy_(0, rows, again(rows))
    return norms
