"""Grouped products, `y_r = x_r @ W_e(r)`: rows sorted by the expert that they go to, with one matrix for each expert.

Where the rows of one expert end is said by offsets. The gradient of example i is, for expert e, the sum of `x_t^T g_t`
over those of its positions t that went to e: that of a linear operation over these positions alone. They are a *group*,
and the squared norm is the sum of those of the groups of i. So the groups of a batch are the rows of a linear
operation, filled up with zeros to one of a few widths, and none of them meets positions of another expert.

Axes: B examples, T positions, R rows, E experts, G groups, P positions of a group, I input features, O output features.
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
from privet.gradients.rows import factor_norms, of_type, summed, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.linear import outer_norms, positions
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["Grouped"]

_ENTRIES = 2**23
"""How many numbers of groups are laid next to each other at once, about 32 MiB."""


def _parts(use: Use) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the inputs (B, T, I), the expert of each position (B, T), and the gradients (B, T, O)."""
    x, expert = use.data
    assert x is not None
    assert expert is not None
    length = math.prod(x.shape[1:-1])
    rows = use.rows
    gradient = wide(use.gradient).reshape(rows, length, use.gradient.shape[-1])
    return wide(x).reshape(rows, length, x.shape[-1]), expert.reshape(rows, length), gradient


def _joined(uses: Uses) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the parts of all uses, one after the other along T."""
    parts = [_parts(use) for use in uses]
    if len(parts) == 1:
        return parts[0]
    x, expert, gradient = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return x, expert, gradient


def _by_expert(expert: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yields each expert that some rows went to, with their places in `expert`, (R,)."""
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=experts).tolist()
    for number, places in enumerate(torch.split(order, counts)):
        if len(places):
            yield number, places


class _Weight(Rule):
    """The matrices of all experts, (E, I, O)."""

    def per_example(self, uses: Uses) -> Tensor:
        x, expert, gradient = _joined(uses)
        rows = x.new_zeros(uses.rows * uses.shape[0], *uses.shape[1:])
        for group, left, right in _groups(x, expert, gradient, uses.shape[0]):
            rows[group] = torch.bmm(left.mT, right)
        return rows.view(uses.rows, *uses.shape)

    def squared_norms(self, uses: Uses) -> Tensor:
        x, expert, gradient = _joined(uses)
        norms = x.new_zeros(uses.rows)
        for group, left, right in _groups(x, expert, gradient, uses.shape[0]):
            norms.index_add_(0, group // uses.shape[0], outer_norms(left, right))
        return norms

    def rounding(self, uses: Uses) -> Tensor:
        """Returns a share of `|x| |g|`, no less than `sum_t |x_t| |g_t|`."""
        data = summed([factor_norms(_parts(use)[0]) for use in uses])
        gradients = summed([factor_norms(wide(use.gradient)) for use in uses])
        return data.sqrt() * gradients.sqrt() * product_errors(positions(uses, data.dtype), data.device)

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        x, expert, gradient = _joined(uses)
        gradient = gradient * of_type(weights, gradient.dtype).view(-1, 1, 1)
        x, expert, gradient = x.flatten(0, 1), expert.flatten(), gradient.flatten(0, 1)
        total = x.new_zeros(uses.shape)
        for number, places in _by_expert(expert, uses.shape[0]):
            torch.mm(x[places].mT, gradient[places], out=total[number])
        return total


def _groups(
    x: Tensor, expert: Tensor, gradient: Tensor, experts: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # (G,), (G, P, I), (G, P, O)
    """Yields the groups of one width after another: their numbers `i E + e`, their inputs and their gradients.

    A width is a power of two, which is less than twice a group's own size. So the formula that finds its norm is a
    matter of this group alone, and there are few of them however many experts there are.
    """
    examples, length = expert.shape
    if not expert.numel():
        return
    number = torch.arange(examples, device=expert.device).unsqueeze(1) * experts + expert
    order = number.flatten().argsort(stable=True)
    sizes = torch.bincount(number.flatten(), minlength=examples * experts)
    starts = sizes.cumsum(0) - sizes
    x, gradient = x.flatten(0, 1), gradient.flatten(0, 1)
    by_width: dict[int, list[int]] = {}
    for number_of, size in enumerate(sizes.tolist()):
        if size:
            by_width.setdefault(1 << (size - 1).bit_length(), []).append(number_of)
    for width, of_width in by_width.items():
        step = max(1, _ENTRIES // (width * (x.shape[1] + gradient.shape[1])))
        places = torch.arange(width, device=expert.device)
        for start in range(0, len(of_width), step):
            group = torch.tensor(of_width[start : start + step], device=expert.device)
            empty = (places >= sizes[group].unsqueeze(1)).unsqueeze(2)
            rows = order[(starts[group].unsqueeze(1) + places).clamp(max=examples * length - 1)]
            # What lies there is another group's, which may be infinite.
            yield group, x[rows].masked_fill_(empty, 0.0), gradient[rows].masked_fill_(empty, 0.0)


_WEIGHT = _Weight()


class Grouped(Operation):
    """`x_r @ W_e(r)`, for rows sorted by expert.

    Args:
        product: computes it, from x, W and the offsets.
        offsets: (E,), where the rows of each expert end.
    """

    positionwise = True
    rules: Mapping[str, Rule] = {"weight": _WEIGHT}

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor], offsets: Tensor) -> None:
        self._product = product
        self._offsets = offsets

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the product."""
        return self._multiplied(data[0], values["weight"])

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradient times the matrices, transposed; no weight gradient is computed."""
        weight = of_type(values["weight"], gradient.dtype)
        return [of_type(self._multiplied(gradient.contiguous(), weight.mT), data[0].dtype), None]

    def _multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return self._product(x, weight, self._offsets)
        parts, start = [], 0  # torch has no such product in double precision
        for number, stop in enumerate(self._offsets.tolist()):
            parts.append(x[start:stop] @ weight[number])
            start = stop
        return torch.cat(parts)


def _experts_of(x: Tensor, offsets: Tensor) -> Tensor:  # (R,)
    """Returns the expert of each row."""
    rows = torch.arange(x.shape[0], device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, rows, right=True)


@handles(
    *(f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None),
    "transformers::grouped_mm_fallback",
)
def _grouped(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = {"self": "x", "mat_a": "x", "input": "x", "mat2": "weight", "mat_b": "weight"}
    by_name = {names.get(key, key): value for key, value in kwargs.items()}
    a = named(args, by_name, x=None, weight=None, offs=None, bias=None, out_dtype=None)
    if a is None or a.bias is not None or a.out_dtype is not None or not isinstance(a.offs, Tensor):
        return NotImplemented
    plain = isinstance(a.x, Tensor) and a.x.dim() == 2 and a.weight.dim() == 3
    if not plain or call.is_root(a.x) or not call.is_root(a.weight) or call.layout(a.x) is Layout.CONSTANT:
        return NotImplemented
    if int(a.offs[-1]) != a.x.shape[0]:  # rows after the last offset are nobody's, and not even computed
        return NotImplemented
    operation = Grouped(lambda x, weight, offsets: func(x, weight, offs=offsets), a.offs)
    return call.apply(operation, (a.x, _experts_of(a.x, a.offs)), {"weight": a.weight}, layout=call.layout(a.x))
