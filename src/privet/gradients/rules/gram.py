"""Gram matrices: how far rounding may take a norm that they give, and when that is too far.

`sum_ts (l_t . l_s)(r_t . r_s)` is the squared norm of `sum_t l_t r_t^T` without forming it. Its terms may cancel, so a
bound on the rounding error is added, and the norm is found in another way where the bound is not small.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NARROW", "gram_padding", "never_too_small"]

NARROW = 2e-4
"""How much of a squared norm the bound on its rounding error may be."""


def gram_padding(length: int, dtype: torch.dtype) -> float:
    """Returns the relative rounding error of a product of two inner products of at most `length` terms, doubled.

    An inner product errs by more than `2 sqrt(n) u` times the product of the vectors' norms with negligible probability
    (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, Theorem 2.4); 16 stands in for short vectors, where the bound is
    not asymptotic.
    """
    return 2.0 * (math.sqrt(length) + 16.0) * torch.finfo(dtype).eps / 2


def never_too_small(
    gram: Tensor,  # (R,): the squared norms as the Gram matrices gave them
    scale: Tensor,  # (R,): the sum of the sizes of their terms, at least
    length: int,  # the most terms of one inner product
) -> Tensor | None:  # (R,)
    """Returns the squared norms plus a bound on their rounding error.

    Returns None where the bound is more than `NARROW` of some norm: then a sum of squares has to be taken instead.
    """
    padding = scale * gram_padding(length, gram.dtype)
    # Rows that are not finite are dropped later, whatever their norm; zero rows have zero padding.
    if bool(((padding > NARROW * gram) & (scale > 0) & gram.isfinite() & scale.isfinite()).any()):
        return None
    norms: Tensor = gram.clamp(min=0) + padding
    return norms
