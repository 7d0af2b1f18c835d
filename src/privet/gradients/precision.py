"""How precisely products of tensors are computed: torch's settings, read where a bound depends on them.

Matrix products and convolutions of float32 may run on units that round their operands first: to TF32 on NVIDIA GPUs, to
TF32 or bfloat16 on some CPUs. The settings are global, and users change them at any time. So they are read whenever a
norm or a weight is computed, and the bounds are widened by what is in force.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Kind", "eps_in_force", "product_error", "product_errors"]

Kind = Literal["matmul", "convolution"]
"""Which operations count: matrix products alone, or convolutions as well."""

_ROUNDED = {"tf32": 2.0**-10, "bf16": 2.0**-8}
"""Relative error of an operand: TF32 keeps 11 significant bits and may cut off the rest, bfloat16 rounds to 8 bits."""


def eps_in_force(dtype: torch.dtype, device: torch.device, *, kind: Kind = "matmul") -> float:
    """Returns the relative error with which a product of tensors takes each of its operands.

    It is 0 where the operands are taken as they are. Sums within a product are those of the type itself.

    Args:
        dtype: of the operands.
        device: where they are.
        kind: "convolution" also looks at the setting for convolutions. On NVIDIA GPUs that is TF32 by default.
    """
    if dtype != torch.float32:
        return 0.0
    taken = _ROUNDED.get(_matmul(device), 0.0)
    return taken if kind == "matmul" else max(taken, _ROUNDED.get(_convolution(device), 0.0))


def product_error(terms: int, dtype: torch.dtype, device: torch.device, *, kind: Kind = "matmul") -> float:
    """Returns a bound on the error of an inner product of at most so many terms, relative to the sum of their sizes.

    The rounding grows with the root of the number of terms, but for negligible probability (Higham and Mary, SIAM J.
    Sci. Comput. 41, 2019, Theorem 2.4); 16 stands in for short vectors, where that bound is not asymptotic, and no sum
    of n terms errs by more than about `n u`. What operands lose that are rounded first is added.
    """
    taken = eps_in_force(dtype, device, kind=kind)
    return _error_of_sum(terms, dtype) + taken * (2.0 + taken)


@functools.lru_cache(maxsize=1024)  # asked at every operation of every step
def _error_of_sum(terms: int, dtype: torch.dtype) -> float:
    return min(terms + 4.0, math.sqrt(terms) + 16.0) * torch.finfo(dtype).eps / 2


def product_errors(terms: Tensor, device: torch.device, *, kind: Kind = "matmul") -> Tensor:  # (R,) -> (R,)
    """Returns `product_error` for each row's own number of terms, so that no row's depends on how long others are."""
    taken = eps_in_force(terms.dtype, device, kind=kind)
    most = torch.minimum(terms + 4.0, terms.sqrt() + 16.0)
    return most * (torch.finfo(terms.dtype).eps / 2) + taken * (2.0 + taken)


def _matmul(device: torch.device) -> str:
    return _setting(device, "matmul")


def _convolution(device: torch.device) -> str:
    return _setting(device, "conv")


def _setting(device: torch.device, operation: str) -> str:
    """Returns what torch says of an operation on a device: "ieee", "none", "tf32" or "bf16"."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        backend: Any = torch.backends.cuda if operation == "matmul" else torch.backends.cudnn
    else:
        backend = torch.backends.mkldnn
    found: str | None = getattr(getattr(backend, operation, None), "fp32_precision", None)
    if found is not None:
        return found
    # Before torch 2.9 there is one setting for all matrix products, and a switch for each library of the GPU.
    slow = {"highest": "ieee", "high": "tf32", "medium": "bf16"}[torch.get_float32_matmul_precision()]
    switched = torch.backends.cuda.matmul.allow_tf32 if operation == "matmul" else torch.backends.cudnn.allow_tf32
    return "tf32" if on_gpu and switched and slow == "ieee" else slow
