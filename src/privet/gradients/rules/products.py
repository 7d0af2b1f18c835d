"""Products with a parameter as torch writes them: `matmul`, `mv`, `bmm`, and with something added.

A matrix makes a linear operation (`linear.py`). A vector is a matrix of one column. Several matrices take the rows of
their own head each, as block-diagonal layers and tables of relative positions do. Their gradients are those of one
linear operation for each head.

Axes: B examples, T positions (all axes between), H heads, I input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privet.gradients.layout import Layout
from privet.gradients.rows import of_type, wide
from privet.gradients.rules.linear import Linear, linear_of
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Allowance, Operation, Rule, Use, Uses

__all__ = ["HeadwiseLinear", "product"]

_LINEAR = Linear(transposed=True)
_ONE = _LINEAR.rules["weight"]


def _by_head(t: Tensor) -> Tensor:  # (B, ..., H, F) -> (B, H, T, F)
    """Returns data or gradients of one use, as a sequence for each head."""
    return wide(t).reshape(t.shape[0], math.prod(t.shape[1:-2]), *t.shape[-2:]).transpose(1, 2)


def _joined(uses: Uses) -> tuple[Tensor, Tensor]:  # -> a (B, H, T, I), g (B, H, T, O)
    """Returns data and gradients of all uses, one after the other along T."""
    pairs = [(_by_head(a), _by_head(use.gradient)) for use in uses for a in use.data if a is not None]
    return torch.cat([a for a, _ in pairs], 2), torch.cat([g for _, g in pairs], 2)


def _as_linear(uses: Uses) -> Uses:
    """Returns the uses as one of a linear operation, whose rows are the heads of all examples."""
    a, g = (t.flatten(0, 1) for t in _joined(uses))
    return Uses((Use(_LINEAR, "weight", (a,), g, uses.shape[1:]),), allowance=Allowance(0))


class _Matrices(Rule):
    """The matrices, (H, I, O). No entry of one is in another, so their squared norms add up."""

    def per_example(self, uses: Uses) -> Tensor:
        return _ONE.per_example(_as_linear(uses)).reshape(uses.rows, *uses.shape)

    def squared_norms(self, uses: Uses) -> Tensor:
        return _ONE.squared_norms(_as_linear(uses)).view(uses.rows, uses.shape[0]).sum(1)

    def rounding(self, uses: Uses) -> Tensor:
        """Returns the norm of the bounds of all heads."""
        errors = _ONE.rounding(_as_linear(uses))
        assert errors is not None
        return errors.view(uses.rows, uses.shape[0]).square().sum(1).sqrt()

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        a, g = _joined(uses)
        g = g * of_type(weights, g.dtype).view(-1, 1, 1, 1)
        left, right = (t.transpose(0, 1).flatten(1, 2) for t in (a, g))  # (H, B T, F)
        return torch.bmm(left.mT, right)


class HeadwiseLinear(Operation):
    """`x_h @ W_h` for every head h, of x with the heads on its last axis but one."""

    positionwise = True
    rules: Mapping[str, Rule] = {"weight": _Matrices()}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:  # (..., H, I) -> (..., H, O)
        """Returns the products."""
        return _products(data[0], values["weight"])

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradient times the matrices; no gradient of them is computed."""
        return [of_type(_products(gradient, of_type(values["weight"], gradient.dtype).mT), data[0].dtype)]


def _products(x: Tensor, matrices: Tensor) -> Tensor:  # (..., H, F), (H, F, G) -> (..., H, G)
    if x.dim() == 2:
        return torch.bmm(x.unsqueeze(1), matrices).squeeze(1)
    return torch.matmul(x.movedim(-2, -3), matrices).movedim(-3, -2)


def product(call: Call, first: Tensor, second: Tensor) -> Any:
    """Returns a product with a parameter that is no matrix, captured, or NotImplemented if it is another one.

    Args:
        call: captures it.
        first: data of (..., I) or (..., H, T, I); or matrices (H, O, I), and data of (..., H, I, T) second.
        second: a vector (I,) or matrices (H, I, O).
    """
    if call.is_root(first) and not call.is_root(second) and 2 < first.dim() <= second.dim():
        turned = call.again(Tensor.transpose, first, -1, -2)
        found = _headwise(call, second.mT, turned, call.layout(second))
        return found if found is NotImplemented else found.mT
    if call.is_root(first) or not call.is_root(second):
        return NotImplemented
    if second.dim() == 1 and first.dim() > 1:
        return call.again(torch.matmul, first, call.again(Tensor.unsqueeze, second, 1)).squeeze(-1)
    return _headwise(call, first, second, call.layout(first))


def _headwise(call: Call, x: Tensor, matrices: Tensor, layout: Layout) -> Any:
    while matrices.dim() > 3 and matrices.shape[0] == 1 and x.dim() >= matrices.dim():
        matrices = call.again(Tensor.squeeze, matrices, 0)
    if matrices.dim() != 3 or x.dim() < 3 or layout in (Layout.CONSTANT, Layout.ROUTED, Layout.SECOND_TURNED):
        return NotImplemented
    heads = matrices.shape[0]
    if heads == 1 and layout.axis < x.dim() - 2:
        return call.again(torch.matmul, x, call.again(Tensor.squeeze, matrices, 0))
    place = x.dim() - 3  # the axis of the heads
    if place and x.shape[place] == 1:
        x = x.expand(*x.shape[:place], heads, *x.shape[place + 1 :])
    if x.shape[place] != heads or x.shape[-1] != matrices.shape[1] or layout.axis == place or layout.axis > place + 1:
        return NotImplemented
    if layout.axis > place:  # the heads are in front of the examples, and go behind them
        layout = Layout.ROWS if layout is Layout.SECOND else Layout.MERGED
    found = call.apply(HeadwiseLinear(), (x.movedim(place, -2),), {"weight": matrices}, layout=layout)
    return found.movedim(-2, place)


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs or not all(isinstance(t, Tensor) for t in args):
        return NotImplemented
    first, second = args
    if call.is_root(second) and second.dim() == 2:
        return linear_of(call, first, second, None, transposed=True)
    if call.is_root(first) and first.dim() == 2:
        return _from_left(call, first, second)
    return product(call, first, second)


@handles(Tensor.__rmatmul__)
def _rmatmul(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _matmul(call, torch.matmul, args[::-1], kwargs)


def _from_left(call: Call, weight: Tensor, x: Tensor) -> Any:
    """`W @ x` for x of (B, ..., I, T): the transpose of a linear operation of the transpose."""
    if call.is_root(x) or x.dim() < 3 or call.layout(x) is Layout.CONSTANT or call.layout(x).axis > x.dim() - 3:
        return NotImplemented
    return call.apply(Linear(), (x.mT,), {"weight": weight, "bias": None}, layout=call.layout(x)).mT


@handles(torch.mv, Tensor.mv, torch.bmm, Tensor.bmm, structural=True)
def _product(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs or not all(isinstance(t, Tensor) for t in args):
        return NotImplemented
    return _of_equals(call, *args)


def _of_equals(call: Call, first: Tensor, second: Tensor) -> Any:
    """Returns the product of a matrix and a vector, or of equally many matrices: nothing is spread."""
    if second.dim() == 1:
        return product(call, first, second) if first.dim() == 2 else NotImplemented
    if first.dim() != 3 or second.dim() != 3 or first.shape[0] != second.shape[0]:
        return NotImplemented
    return product(call, first, second)


@handles(torch.addmv, Tensor.addmv, torch.baddbmm, Tensor.baddbmm, torch.addbmm, Tensor.addbmm, structural=True)
def _added(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product that something is added to: one after the other, each captured by itself."""
    if len(args) != 3 or not kwargs.keys() <= {"beta", "alpha"} or not all(isinstance(t, Tensor) for t in args):
        return NotImplemented
    added, first, second = args
    if call.is_root(first) == call.is_root(second):
        return NotImplemented
    summed = func in (torch.addbmm, Tensor.addbmm)
    if summed and not call.layout(second if call.is_root(first) else first).axis:
        return NotImplemented  # the sum would be over the batch
    found = _of_equals(call, first, second)
    if found is NotImplemented:
        return NotImplemented
    found = found.sum(0) if summed else found
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    found = found if alpha == 1 else found * alpha
    if torch.broadcast_shapes(added.shape, found.shape) != found.shape:  # type: ignore[no-untyped-call]
        return NotImplemented  # torch says what is wrong
    if beta == 0:  # what would be added is not looked at, not even where it is NaN
        return found
    added = added if beta == 1 else call.again(torch.mul, added, beta)
    return call.again(torch.add, added, found)
