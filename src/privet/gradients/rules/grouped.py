"""Grouped products, `y_r = x_r @ W_e(r)`: rows sorted by the expert that they go to, with one matrix for each expert.

Where the rows of one expert end is said by offsets. The gradient of example i is, for expert e, the sum of `x_t^T g_t`
over those of its positions t that went to e. So its squared norm is `sum_ts [e(t) = e(s)] (x_t . x_s)(g_t . g_s)`, the
Gram form of a linear operation (Li et al., arXiv 2110.05679) with the pairs of different experts left out.

Axes: B examples, T positions, R rows, E experts, I input features, O output features.
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
from privet.gradients.rows import factor_norms, of_type, padded, row_norms, summed, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.gram import never_too_small
from privet.gradients.rules.linear import positions
from privet.gradients.rules.registry import Call, handles
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["Grouped"]


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
        rows = x.new_zeros(uses.rows, *uses.shape)
        for number in range(uses.shape[0]):
            mine = (expert == number).unsqueeze(2)
            if bool(mine.any()):
                rows[:, number] = torch.bmm(torch.where(mine, x, 0.0).mT, torch.where(mine, gradient, 0.0))
        return rows

    def squared_norms(self, uses: Uses) -> Tensor:
        x, expert, gradient = _joined(uses)
        chunks = row_chunks(uses.rows, 4 * x.shape[1] ** 2 * x.element_size())
        norms = [self._gram_norms(uses, x[c], expert[c], gradient[c], c.start) for c in chunks]
        return torch.cat(norms) if norms else x.new_zeros(0)

    @staticmethod
    def _gram_norms(uses: Uses, x: Tensor, expert: Tensor, gradient: Tensor, start: int) -> Tensor:
        same = expert.unsqueeze(2) == expert.unsqueeze(1)
        gram = torch.bmm(x, x.mT).mul_(torch.bmm(gradient, gradient.mT)).mul_(same).flatten(1).sum(1)
        lengths = torch.linalg.vector_norm(x, dim=2), torch.linalg.vector_norm(gradient, dim=2)
        entries = (x.shape[2], gradient.shape[2])

        def again(rows: Tensor) -> Tensor:
            return _instantiated(uses.selected(rows + start))

        return never_too_small(gram, lengths, entries, terms=max(entries), again=again)

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
            total[number] = x[places].mT @ gradient[places]
        return total


_WEIGHT = _Weight()


def _instantiated(uses: Uses) -> Tensor:  # (B,)
    """Returns the squared norms as sums of squares, of a few examples at a time."""
    size = 2 * math.prod(uses.shape) * wide(uses[0].gradient).element_size()
    parts = [uses.narrowed(c.start, c.stop) for c in row_chunks(uses.rows, size)]
    norms = torch.cat([row_norms(_WEIGHT.per_example(part)) for part in parts])
    return padded(norms, _WEIGHT.rounding(uses))  # the weighted sum will not be one of these rows


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
