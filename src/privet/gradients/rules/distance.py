"""Euclidean distances of data to the rows of a parameter, as prototypes and codebooks have them: `cdist` with p = 2.

Axes: B examples, T positions (all axes before the last), K entries of the parameter, D features. With
`h = g / distance`, the gradient of entry k is `sum_t h_tk (w_k - x_t)`, and zero where the distance is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privet.gradients.layout import Layout
from privet.gradients.rows import of_type, summed, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule, Uses

__all__ = ["Distance"]


def _shares(gradient: Tensor, distances: Tensor) -> Tensor:
    """Returns the gradient over the distance; zero where two points are the same, as torch has it."""
    return (gradient / distances).masked_fill(distances == 0.0, 0.0)


class _Entries(Rule):
    """The entries, (K, D)."""

    def per_example(self, uses: Uses) -> Tensor:
        rows = []
        for use in uses:
            (x, distances), operation = use.data, use.operation
            assert x is not None
            assert distances is not None
            assert isinstance(operation, Distance)
            length = math.prod(x.shape[1:-1])
            h = _shares(wide(use.gradient), wide(distances)).reshape(use.rows, length, use.shape[0])
            entries = of_type(operation.entries, h.dtype)
            data = wide(x).reshape(use.rows, length, use.shape[1])
            rows.append(h.sum(1).unsqueeze(2) * entries - torch.bmm(h.mT, data))
        return summed(rows)


class Distance(Operation):
    """The distances of data (..., D) to the entries (K, D): (..., K)."""

    positionwise = True
    rules: Mapping[str, Rule] = {"entries": _Entries()}
    entries: Tensor
    _distances: Tensor

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the distances."""
        self.entries = values["entries"]
        self._distances = torch.cdist(data[0], self.entries)
        return self._distances.clone()  # an activation may change what is returned

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Copies the entries, which are a part of their own gradient."""
        self.entries = values["entries"].clone()

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns the data and the distances."""
        return data[0], self._distances

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradient of the data, `sum_k h_k (x - w_k)`."""
        h = _shares(gradient, of_type(self._distances, gradient.dtype))
        x, entries = (of_type(t, h.dtype) for t in (data[0], values["entries"]))
        return [of_type(h.sum(-1, keepdim=True) * x - h @ entries, data[0].dtype)]


@handles(torch.cdist)
def _cdist(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, x1=None, x2=None, p=2.0, compute_mode="use_mm_for_euclid_dist_if_necessary")
    if a is None or a.p != 2.0 or a.compute_mode != "use_mm_for_euclid_dist_if_necessary":
        return NotImplemented
    x, entries = a.x1, a.x2
    if call.is_root(x):
        turned = _cdist(call, func, (entries, x), {})
        return turned if turned is NotImplemented else turned.mT
    while call.is_root(entries) and entries.dim() > 2 and entries.shape[0] == 1 and x.dim() >= entries.dim():
        entries = call.again(Tensor.squeeze, entries, 0)
    if not call.is_root(entries) or entries.dim() != 2 or call.layout(x) in (Layout.CONSTANT, Layout.ROUTED):
        return NotImplemented
    if call.layout(x).axis > x.dim() - 2:
        return NotImplemented
    return call.apply(Distance(), (x,), {"entries": entries}, layout=call.layout(x))
