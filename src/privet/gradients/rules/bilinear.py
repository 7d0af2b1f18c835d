"""Bilinear operations, `y_k = x^T W_k z + b_k`: linear ones of the outer product of their two inputs.

Axes: B examples, T positions (all axes between first and last), I and J input features, O output features. The
gradient of example i is `sum_t g_it (x_it z_it^T)`, (O, I, J): with one position, its norm is the product of the three
norms; with several, it is that of a linear operation of `x_it z_it^T`, a few examples at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.layout import Layout
from privet.gradients.precision import product_errors
from privet.gradients.rows import factor_norms, lost, of_type, raised, summed, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.linear import Linear, positions
from privet.gradients.rules.registry import Call, handles
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.use import Allowance, Operation, Rule, Use, Uses

__all__ = ["Bilinear"]

_LINEAR = Linear()
_WEIGHT = _LINEAR.rules["weight"]


def _inputs(use: Use) -> tuple[Tensor, Tensor]:
    """Returns the two inputs as sequences, (B, T, I) and (B, T, J)."""
    x, z = use.data
    assert x is not None
    assert z is not None
    length = math.prod(x.shape[1:-1])
    return wide(x).reshape(use.rows, length, x.shape[-1]), wide(z).reshape(use.rows, length, z.shape[-1])


def _outer_norms(x: Tensor, z: Tensor) -> Tensor:  # (B, T, I), (B, T, J) -> (B,)
    """Returns the squared norms of the outer product, which is a factor itself; see `factor_norms`."""
    norms = factor_norms(x) * factor_norms(z)
    return raised(norms, lost(math.prod(x.shape[1:]) * z.shape[2], norms.dtype))


def _as_linear(use: Use) -> Use:
    """Returns the same use as one of a linear operation of the outer product."""
    x, z = _inputs(use)
    outer = (x.unsqueeze(3) * z.unsqueeze(2)).flatten(2)  # (B, T, I J)
    gradient = use.gradient.reshape(use.rows, x.shape[1], use.gradient.shape[-1])
    return Use(_LINEAR, "weight", (outer,), gradient, (use.shape[0], outer.shape[2]))


def _in_parts(uses: Uses) -> Iterator[tuple[slice, Uses]]:
    """Yields the uses as linear ones, of so many rows at a time that outer products stay small."""
    length = sum(math.prod(use.gradient.shape[1:-1]) for use in uses)
    for chunk in row_chunks(uses.rows, 4 * length * math.prod(uses.shape[1:])):
        part = uses.narrowed(chunk.start, chunk.stop)
        yield chunk, Uses(tuple(map(_as_linear, part)), allowance=Allowance(0))


class _Weight(Rule):
    """The tensor W, (O, I, J)."""

    def per_example(self, uses: Uses) -> Tensor:
        linear = Uses(tuple(map(_as_linear, uses)))
        return _WEIGHT.per_example(linear).reshape(uses.rows, *uses.shape)

    def squared_norms(self, uses: Uses) -> Tensor:
        if len(uses) == 1:
            x, z = _inputs(uses[0])
            if x.shape[1] == 1:
                return _outer_norms(x, z) * factor_norms(wide(uses[0].gradient))
        norms = [_WEIGHT.squared_norms(part) for _, part in _in_parts(uses)]
        return torch.cat(norms) if norms else wide(uses[0].gradient).new_zeros(0)

    def rounding(self, uses: Uses) -> Tensor:
        """Returns a share of `|x| |z| |g|`, no less than `sum_t |x_t| |z_t| |g_t|`."""
        outer = summed([_outer_norms(*_inputs(use)) for use in uses])
        gradients = summed([factor_norms(wide(use.gradient)) for use in uses])
        return outer.sqrt() * gradients.sqrt() * product_errors(positions(uses, outer.dtype), outer.device)

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        total = wide(uses[0].gradient).new_zeros(uses.shape[0], math.prod(uses.shape[1:]))
        for chunk, part in _in_parts(uses):
            total += _WEIGHT.weighted_sum(part, weights[chunk])
        return total.view(uses.shape)


class Bilinear(Operation):
    """`x^T W_k z + b_k` for every output feature k."""

    positionwise = True
    rules: Mapping[str, Rule] = {"weight": _Weight(), "bias": _LINEAR.rules["bias"]}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the form's value, and the bias added."""
        return F.bilinear(data[0], data[1], values["weight"], values.get("bias"))

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradients of the two inputs; no weight gradient is computed."""
        weight = of_type(values["weight"], gradient.dtype)
        x, z = (of_type(d, gradient.dtype) for d in data)
        results: list[Tensor | None] = [None, None]
        if needed[0]:
            results[0] = of_type(F.bilinear(gradient, z, weight.permute(1, 0, 2).contiguous()), data[0].dtype)
        if needed[1]:
            results[1] = of_type(F.bilinear(gradient, x, weight.permute(2, 0, 1).contiguous()), data[1].dtype)
        return results


@handles(F.bilinear, torch.bilinear)
def _bilinear(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input1=None, input2=None, weight=None, bias=None)
    if a is None or call.is_root(a.input1) or call.is_root(a.input2) or not call.is_root(a.weight):
        return NotImplemented
    if call.layout(a.input1) is Layout.CONSTANT or call.layout(a.input1) is not call.layout(a.input2):
        return NotImplemented
    if a.input1.dim() < 2 or (a.bias is not None and not call.is_root(a.bias) and a.bias.requires_grad):
        return NotImplemented
    return call.apply(Bilinear(), (a.input1, a.input2), {"weight": a.weight, "bias": a.bias})
