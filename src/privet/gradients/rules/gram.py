"""Gram matrices: how far rounding may take a norm that they give, and when that is too far.

`sum_ts (l_t . l_s)(r_t . r_s)` is the squared norm of `sum_t l_t r_t^T` without forming it. Its terms may cancel, so a
bound on the rounding error is added, and the norm is found in another way where the bound is not small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from privet.gradients.precision import Kind, product_error
from privet.gradients.rows import lost

__all__ = ["NARROW", "gram_padding", "never_too_small"]

NARROW = 2e-4
"""How much of a squared norm the bound on its rounding error may be."""


def gram_padding(length: int, dtype: torch.dtype, device: torch.device, *, kind: Kind = "matmul") -> float:
    """Returns the relative rounding error of a product of two inner products of at most `length` terms."""
    return 2.0 * product_error(max(length, 16), dtype, device, kind=kind)  # 16, for the double sum that follows


def never_too_small(
    gram: Tensor,  # (R,): the squared norms as the Gram matrices gave them
    lengths: tuple[Tensor, Tensor],  # (R, T) each: the norms of the vectors l and r
    entries: tuple[int, int],  # of one l and of one r
    *,
    terms: int,  # that one inner product adds up at once
    kind: Kind = "matmul",
) -> Tensor | None:  # (R,)
    """Returns the squared norms plus a bound on their rounding error and on what underflow took.

    Returns None where the bound is more than `NARROW` of some norm: then a sum of squares has to be taken instead. The
    part for underflow is not asked: nothing but it is left of a norm that is as small as that.

    An inner product of n terms loses at most `lost(n)` to underflow, and each norm the root of that. With L and R the
    sums of the lengths over the positions, these change the double sum by at most `lost(n) R^2 + lost(m) L^2`, and the
    bound on its rounding by a small part of that. The products of two inner products lose at most `lost(T^2)`.
    """
    left, right = lengths
    scale: Tensor = (left * right).sum(1).square()
    padding = scale * gram_padding(terms, gram.dtype, gram.device, kind=kind)
    # Rows that are not finite are dropped later, whatever their norm; zero rows have zero padding.
    if bool(((padding > NARROW * gram) & (scale > 0) & gram.isfinite() & scale.isfinite()).any()):
        return None
    hidden = right.sum(1).square() * (4.0 * lost(entries[0], gram.dtype))
    hidden += left.sum(1).square() * (4.0 * lost(entries[1], gram.dtype))
    norms: Tensor = (gram + lost(left.shape[1] ** 2, gram.dtype)).clamp(min=0) + padding + hidden
    return norms
