"""Norms of examples and patches of images, as Opacus's own layers need them. The core uses none of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "calc_sample_norms",
    "calc_sample_norms_one_layer",
    "filter_dilated_rows",
    "sum_over_all_but_batch_and_last_n",
    "unfold2d",
    "unfold3d",
]


def calc_sample_norms(named_params: Iterator[tuple[str, Tensor]], *, flat: bool = True) -> list[Tensor]:
    """Returns the norm of each example's rows, (B,): over all tensors together if `flat`, else one for each tensor.

    Args:
        named_params: names and tensors `(B, ...)`.
        flat: whether the norm is over all of them.
    """
    norms = [calc_sample_norms_one_layer(rows) for _, rows in named_params]
    return [torch.stack(norms).norm(2, dim=0)] if flat else norms


def calc_sample_norms_one_layer(param: Tensor) -> Tensor:
    """Returns the norm of each example's row, (B,)."""
    return param.flatten(1).norm(2, dim=1) if param.dim() > 1 else param.abs()


def sum_over_all_but_batch_and_last_n(tensor: Tensor, n_dims: int) -> Tensor:
    """Returns the sum over the axes between the first and the last `n_dims`."""
    between = tuple(range(1, tensor.dim() - n_dims))
    return tensor.sum(between) if between else tensor


def _each(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _unfolded(tensor: Tensor, kernel: Any, padding: Any, stride: Any, dilation: Any) -> Tensor:
    """Returns the patches of a batch of grids, `(B, C * prod(kernel), patches)`, for any number of axes."""
    count = tensor.dim() - 2
    kernel, stride, dilation = _each(kernel, count), _each(stride, count), _each(dilation, count)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "same":
        sides = [(total // 2, total - total // 2) for total in reach]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, count)]
    tensor = F.pad(tensor, [side for pair in reversed(sides) for side in pair])
    for axis, (far, step) in enumerate(zip(reach, stride, strict=True)):
        tensor = tensor.unfold(2 + axis, far + 1, step)
    for axis, far in enumerate(dilation):
        kept: Any = tuple(slice(None, None, far) if i == axis else slice(None) for i in range(count))
        tensor = tensor[(..., *kept)]
    places, inside = list(range(2, 2 + count)), list(range(2 + count, 2 + 2 * count))
    return tensor.permute(0, 1, *inside, *places).flatten(2 + count).flatten(1, 1 + count)


def unfold2d(input: Tensor, *, kernel_size: Any, padding: Any, stride: Any, dilation: Any) -> Tensor:  # noqa: A002 - Opacus's name
    """Returns the patches of images (B, C, H, W), `(B, C * prod(kernel_size), patches)`."""
    return _unfolded(input, kernel_size, padding, stride, dilation)


def unfold3d(tensor: Tensor, *, kernel_size: Any, padding: Any = 0, stride: Any = 1, dilation: Any = 1) -> Tensor:
    """Returns the patches of volumes (B, C, D, H, W), `(B, C * prod(kernel_size), patches)`.

    Raises:
        ValueError: if the tensor has not five axes.
    """
    if tensor.dim() != 5:
        raise ValueError(f"Input tensor must be of the shape [B, C, D, H, W], got {tuple(tensor.shape)}.")
    return _unfolded(tensor, kernel_size, padding, stride, dilation)


def filter_dilated_rows(
    tensor: Tensor, dilation: Sequence[int], dilated_kernel_size: Sequence[int], kernel_size: Sequence[int]
) -> Tensor:
    """Returns the entries of dilated patches that the kernel meets; the patches are on the last axes."""
    steps: Any = tuple(slice(None, size, step) for size, step in zip(dilated_kernel_size, dilation, strict=True))
    return tensor[(..., *steps)]
