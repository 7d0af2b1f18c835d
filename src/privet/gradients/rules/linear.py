"""Linear operations: `x @ W.T + b` and `x @ W + b` for a matrix W and any number of axes before the last.

Axes: B examples, T positions (all axes between first and last), I input features, O output features. The gradient of
example i is `sum_t g_it a_it^T`; a matrix used several times met one longer sequence, so uses are joined along T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.precision import product_errors
from privet.gradients.rows import factor_norms, of_type, padded, row_norms, summed, weighted_rows, wide
from privet.gradients.rules.gram import never_too_small
from privet.gradients.rules.pool import scratch
from privet.gradients.rules.registry import Call, handles
from privet.gradients.rules.strategy import Strategy, linear_strategy, row_chunks
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["Linear", "linear_of", "outer_norms", "positions"]


def _sequence(t: Tensor) -> Tensor:  # (B, ..., F) -> (B, T, F)
    return t.reshape(t.shape[0], math.prod(t.shape[1:-1]), t.shape[-1]) if t.dim() != 3 else t


def _joined(uses: Uses) -> tuple[Tensor, Tensor]:  # -> a (B, T, I), g (B, T, O)
    """Returns activations and gradients of all uses, one after the other along T."""
    pairs = [(_sequence(wide(_data(use))), _sequence(wide(use.gradient))) for use in uses]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([a for a, _ in pairs], dim=1), torch.cat([g for _, g in pairs], dim=1)


def _single(uses: Uses) -> tuple[Tensor, Tensor] | None:  # -> a (B, I), g (B, O)
    """Returns activations and gradients where each example has one position, in which case its gradient is `g a^T`."""
    if len(uses) == 1:
        a, g = wide(_data(uses[0])), wide(uses[0].gradient)
        if a.dim() == 2:
            return a, g
        if math.prod(a.shape[1:-1]) == 1:
            return a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    return None


def positions(uses: Uses, dtype: torch.dtype) -> Tensor:  # (R,)
    """Returns the number of each row's own positions: those with a gradient, and not zeros that fill up."""
    return summed([(_sequence(use.gradient) != 0.0).any(2).sum(1, dtype=dtype) for use in uses])


def _data(use: Use) -> Tensor:
    data = use.data[0]
    assert data is not None
    return data


class _Weight(Rule):
    """The matrix: `g^T a` per example, (O, I), or its transpose where the operation was `x @ W`."""

    def __init__(self, *, transposed: bool) -> None:
        self._transposed = transposed

    def _oriented(self, uses: Uses) -> tuple[Tensor, Tensor]:
        """Returns (left, right) such that example i's gradient is `left_i^T right_i`."""
        a, g = _joined(uses)
        return (a, g) if self._transposed else (g, a)

    def factors(self, uses: Uses) -> tuple[Tensor, Tensor]:
        return self._oriented(uses)

    def per_example(self, uses: Uses) -> Tensor:
        return _products(*self._oriented(uses))

    def squared_norms(self, uses: Uses) -> Tensor:
        if (pair := _single(uses)) is not None:
            return factor_norms(pair[0]) * factor_norms(pair[1])
        left, right = self._oriented(uses)
        strategy = linear_strategy(left, right, budget=uses.allowance.left)
        match strategy:
            case Strategy.GRAM:
                return _gram_norms(left, right, again=lambda rows: self._tile_norms(uses.selected(rows)))
            case Strategy.ROWS:
                return row_norms(uses.remembered(lambda: _products(left, right)))
            case Strategy.TILES:
                return self._tile_norms(uses)

    def _tile_norms(self, uses: Uses) -> Tensor:
        left, right = self._oriented(uses)
        chunks = row_chunks(left.shape[0], left.shape[2] * right.shape[2] * left.element_size())
        norms = torch.cat([row_norms(_products(left[c], right[c])) for c in chunks])
        # The weighted sum will be one product over all rows, and not of these.
        return padded(norms, self.rounding(uses))

    def rounding(self, uses: Uses) -> Tensor:
        """Returns a share of `|a| |g|`: by Cauchy and Schwarz, no less than `sum_t |a_t| |g_t|`."""
        data = summed([factor_norms(wide(_data(use))) for use in uses])
        gradients = summed([factor_norms(wide(use.gradient)) for use in uses])
        return data.sqrt() * gradients.sqrt() * product_errors(positions(uses, data.dtype), data.device)

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        if uses.rows_memo is not None:
            return weighted_rows(uses.rows_memo, weights)
        if (pair := _single(uses)) is not None:
            a, g = pair
            weights = of_type(weights, g.dtype).unsqueeze(1)
            return a.t() @ (g * weights) if self._transposed else (g * weights).t() @ a
        left, right = self._oriented(uses)
        weights = of_type(weights, left.dtype).view(-1, 1, 1)
        # The smaller factor takes the weights: it is the one that is copied.
        if left.shape[2] <= right.shape[2]:
            left = torch.mul(left, weights, out=scratch(left.shape, left))
        else:
            right = torch.mul(right, weights, out=scratch(right.shape, right))
        return left.flatten(0, 1).mT @ right.flatten(0, 1)


def _products(left: Tensor, right: Tensor) -> Tensor:  # (B, T, O), (B, T, I) -> (B, O, I)
    """Returns `left_i^T right_i`, in memory with the longer side last, which is how the product is fastest."""
    if left.shape[2] > right.shape[2]:
        return _products(right, left).mT
    shape = (left.shape[0], left.shape[2], right.shape[2])
    return torch.bmm(left.mT, right, out=scratch(shape, left))


def outer_norms(left: Tensor, right: Tensor) -> Tensor:  # (R, T, I), (R, T, O) -> (R,)
    """Returns the squared norms of `left_i^T right_i`, or a little more, in the way that is cheapest for their shape.

    It is at least that of a sum of the same terms in any order, and its formula is the same for any number of rows.
    """

    def tiled(rows: Tensor | slice) -> Tensor:
        a, g = left[rows], right[rows]
        chunks = row_chunks(a.shape[0], a.shape[2] * g.shape[2] * a.element_size())
        norms = torch.cat([row_norms(_products(a[c], g[c])) for c in chunks])
        terms = (g != 0.0).any(2).sum(1, dtype=a.dtype)
        return padded(norms, factor_norms(a).sqrt() * factor_norms(g).sqrt() * product_errors(terms, a.device))

    if linear_strategy(left[:1], right[:1], budget=0) is Strategy.GRAM:
        return _gram_norms(left, right, again=tiled)
    return tiled(slice(None))


def _gram_norms(left: Tensor, right: Tensor, *, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `sum_ts (l_t . l_s)(r_t . r_s)` (Li et al., arXiv 2110.05679) plus a bound on its error.

    Args:
        left: (B, T, O).
        right: (B, T, I).
        again: finds the norms whose bound is not narrow, from the indices of their rows; see `never_too_small`.
    """
    gram = (torch.bmm(left, left.mT) * torch.bmm(right, right.mT)).flatten(1).sum(1)
    lengths = torch.linalg.vector_norm(left, dim=2), torch.linalg.vector_norm(right, dim=2)
    entries = (left.shape[2], right.shape[2])
    return never_too_small(gram, lengths, entries, terms=max(entries), again=again)


class _Bias(Rule):
    """A vector added to every position: the sum of the gradient over the positions."""

    def per_example(self, uses: Uses) -> Tensor:
        sums = [g if g.dim() == 2 else _sequence(g).sum(1) for g in (wide(use.gradient) for use in uses)]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


class Linear(Operation):
    """`x @ W.T + b`, or `x @ W + b` where `transposed`."""

    positionwise = True
    sequences = True
    bilinear = True
    _RULES: ClassVar[Mapping[bool, Mapping[str, Rule]]] = {
        kind: {"weight": _Weight(transposed=kind), "bias": _Bias()} for kind in (False, True)
    }

    def __init__(self, *, transposed: bool = False) -> None:
        self.transposed = transposed
        self.rules = self._RULES[transposed]

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the product, and the bias added."""
        weight, bias = values["weight"], values.get("bias")
        return F.linear(data[0], weight.t() if self.transposed else weight, bias)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradient times the matrix; no weight gradient is computed."""
        weight = of_type(values["weight"], gradient.dtype)
        return [of_type(gradient @ (weight.t() if self.transposed else weight), data[0].dtype)]


@handles(F.linear)
def _linear(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def bound(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
        return linear_of(call, input, weight, bias, transposed=False)

    return bound(*args, **kwargs)


@handles(torch.addmm, Tensor.addmm)
def _addmm(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or kwargs or args[0].dim() != 1:
        return NotImplemented
    return linear_of(call, args[1], args[2], args[0], transposed=True)


def linear_of(call: Call, x: Any, weight: Any, bias: Any, *, transposed: bool) -> Any:
    """Returns the captured linear operation, or NotImplemented if it is not one."""
    constant_bias = bias is not None and not call.is_root(bias)
    if call.is_root(x) or not isinstance(x, Tensor) or weight.dim() != 2 or x.dim() < 2:
        return NotImplemented
    if not call.is_root(weight) and (weight.requires_grad or bias is None or constant_bias):
        return NotImplemented
    if constant_bias and bias.requires_grad:
        return NotImplemented
    return call.apply(Linear(transposed=transposed), (x,), {"weight": weight, "bias": bias})
