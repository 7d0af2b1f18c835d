"""Activations that learn: PReLU, with one slope for all channels or one for each.

Axes: B examples, C channels (axis 1). PReLU is `x` where x > 0 and `a_c x` elsewhere, so the gradient of a slope is the
sum of `x g` over the places of its channel where x is not positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.rows import of_type, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule, Uses

__all__ = ["PReLU", "SharedPReLU"]


class _Slope(Rule):
    """The slopes: (1,) or (C,)."""

    def per_example(self, uses: Uses) -> Tensor:
        total: Tensor | None = None
        for use in uses:
            (x,) = use.data
            assert x is not None
            gradient = wide(use.gradient)
            products = torch.where(x > 0, 0.0, wide(x) * gradient)
            channels = math.prod(use.shape)
            rows = (
                products.reshape(use.rows, channels, -1)
                if products.numel()
                else products.new_zeros(use.rows, channels, 1)
            )
            value = rows.sum(2).view(use.rows, *use.shape)
            total = value if total is None else total + value
        assert total is not None
        return total


class PReLU(Operation):
    """PReLU with a slope for each channel, axis 1."""

    rules: Mapping[str, Rule] = {"slope": _Slope()}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the activation."""
        return F.prelu(data[0], values["slope"])

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradient, times the slope where x is not positive."""
        x, slope = data[0], of_type(values["slope"], gradient.dtype)
        shape = (1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else (-1,)
        return [torch.where(x > 0, gradient, gradient * slope.view(shape))]


class SharedPReLU(PReLU):
    """PReLU with one slope: the batch may be on any axis."""

    positionwise = True


@handles(F.prelu, torch.prelu, Tensor.prelu)
def _prelu(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input=None, weight=None)
    if a is None or call.is_root(a.input) or not call.is_root(a.weight):
        return NotImplemented
    operation = SharedPReLU() if a.weight.numel() == 1 else PReLU()
    return call.apply(operation, (a.input,), {"slope": a.weight})
