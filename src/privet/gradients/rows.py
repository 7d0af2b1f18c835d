"""Rows and their numbers: precision, squared norms, and sums that lose nothing that matters.

Axes: R rows, any axes after them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from privet.gradients.tracing import tracing

__all__ = [
    "factor_norms",
    "lost",
    "of_type",
    "padded",
    "raised",
    "row_norms",
    "summed",
    "weighted_rows",
    "wide",
]

_HALF = (torch.float16, torch.bfloat16)
_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


def wide(t: Tensor) -> Tensor:
    """Returns `t` in float32 at least: norms and sums never accumulate in half precision."""
    return t.float() if t.dtype in _HALF else t


def of_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `t.to(dtype)`, without the call where there is nothing to do: most of a small step is such calls."""
    return t if t.dtype == dtype else t.to(dtype)


def summed(terms: Sequence[Tensor]) -> Tensor:  # of one shape
    """Returns the sum of at least one term."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def lost(entries: int, dtype: torch.dtype) -> float:
    """Returns the most that the squared norm of so many entries can lose to underflow.

    A square below the smallest normal number may become zero, on its own or in a partial sum: twice for each entry.
    """
    return 2.0 * entries * _TINY[dtype]


def factor_norms(rows: Tensor) -> Tensor:  # (R, *shape) -> (R,)
    """Returns the squared norm of each row plus all that underflow can have taken from it, for products of norms.

    A square of zero hides a factor of up to 1e-19. That is nothing beside a clip norm, but not once it is multiplied by
    another factor of 1e19. What is returned is at least the true value, at any scale. It is infinite where a norm is
    above 1e19, so that such an example is dropped: its weighted sum could overflow or lose all of its digits.

    Guarantees:
        ==========================  ==============================================
        row                         result, n entries in float32
        ==========================  ==============================================
        zero, subnormal, underflow  the squared norm and `n` times 2.4e-38
        norm above 1.8e19           infinite
        NaN, infinity               not finite
        ==========================  ==============================================
    """
    squares = row_norms(rows)
    return raised(squares, lost(math.prod(rows.shape[1:]), squares.dtype))


def raised(t: Tensor, by: float) -> Tensor:
    """Returns `t + by`. A tensor is kept for each number: making one of it would take longer than the sum."""
    return t + (by if tracing() else _constant(by, t.dtype, t.device))


@functools.lru_cache(maxsize=1024)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def padded(squared: Tensor, sizes: Tensor, error: float = 1.0) -> Tensor:  # (R,), (R,) -> (R,)
    """Returns the squared norms with twice the rounding error added to the norms: `error` of the sizes of their terms.

    A norm and a weighted sum that are formed from the same factors in two ways are of numbers that differ: by the
    rounding errors of both, which are relative to the sizes of the terms and not to their sum.
    """
    return torch.add(squared.sqrt(), sizes, alpha=2.0 * error).square()


def row_norms(rows: Tensor) -> Tensor:  # (R, *shape) -> (R,)
    """Returns the squared norm of each row, summed in chunks of 1024 so that float32 loses nothing that matters.

    One long float32 reduction errs by up to 3e-3 on rows of 3 million entries; chunks stay at about 1e-7. Underflow may
    take up to `lost`: `total_norms` adds that for the entries of a parameter, `factor_norms` for those of a factor.
    """
    flat = wide(_matrix(_in_memory_order(rows)))
    length = flat.shape[1]
    whole = length - length % 1024
    if whole == 0 or flat.shape[0] == 0:
        short: Tensor = torch.linalg.vector_norm(flat, dim=1).square()
        return short
    chunks = flat[:, :whole].reshape(len(flat), -1, 1024)
    squares: Tensor = torch.linalg.vector_norm(chunks, dim=2).square().sum(1)
    if whole < length:
        squares = squares + torch.linalg.vector_norm(flat[:, whole:], dim=1).square()
    return squares


def weighted_rows(rows: Tensor, weights: Tensor) -> Tensor:  # (R, *shape), (R,) -> shape
    """Returns the weighted sum of rows, contiguous: noise and optimizer go through it in that order."""
    ordered = _in_memory_order(rows)
    flat = _matrix(ordered)
    total = torch.mv(flat.t(), of_type(weights, flat.dtype))
    if ordered is rows:
        return total if flat is rows else total.view(rows.shape[1:])
    order = _memory_order(rows)
    back = [order.index(axis) - 1 for axis in range(1, len(order))]
    return total.view(ordered.shape[1:]).permute(back).contiguous()


def _in_memory_order(rows: Tensor) -> Tensor:  # (R, *shape) -> (R, ...)
    """Returns the rows with their axes in the order of memory, so that going through them copies nothing."""
    return rows if rows.dim() < 3 or rows.is_contiguous() else rows.permute(_memory_order(rows))


def _memory_order(rows: Tensor) -> list[int]:
    """Returns the axes in the order of memory, the rows first."""
    strides = rows.stride()
    return [0, *sorted(range(1, rows.dim()), key=lambda axis: -strides[axis])]


def _matrix(rows: Tensor) -> Tensor:  # (R, *shape) -> (R, N)
    return rows if rows.dim() == 2 else rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
