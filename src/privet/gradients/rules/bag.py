"""Bags of table entries: `F.embedding_bag` in each of its modes and forms of input.

Every form is first brought to one: ids (B, L), padded where bags differ in length, and a coefficient for each place.
A sum or a mean is then `sum_l c_l E[x_l]`; the gradient of one bag is `sum_l c_l e_{x_l} g^T`, whose norm is that of g
times that of the coefficients added up by entry: no (B, L, D) tensor of gradients exists. A maximum hands the gradient
of each feature to the entry that won it.

Axes: B examples, T bags of one example, L places in a bag, V entries of the table, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.gradients.layout import Layout
from privet.gradients.precision import product_errors
from privet.gradients.rows import factor_norms, lost, of_type, padded, raised, row_norms, summed, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.embedding import refuse_options, segment_norms, segment_rows
from privet.gradients.rules.registry import Call, handles
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["HighestOf", "WeightedBag", "highest_of", "weighted_bag"]


def weighted_bag(ids: Tensor, coefficients: Tensor, table: Tensor) -> Tensor:  # (B, L), (B, L), (V, D) -> (B, D)
    """Returns the sum of the entries looked up, each times its coefficient."""
    return F.embedding_bag(ids, table, mode="sum", per_sample_weights=of_type(coefficients, table.dtype))


def highest_of(ids: Tensor, counted: Tensor, table: Tensor) -> Tensor:  # (B, L), (B, L) bool, (V, D) -> (B, D)
    """Returns the largest value of each feature among the entries that count, zero where none does."""
    return _winners(ids, counted, table)[0]


def _winners(ids: Tensor, counted: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:  # (B, D), (B, D)
    """Returns the largest values and whose they are, of the first place among equals."""
    if not ids.shape[1]:
        return table.new_zeros(len(ids), table.shape[1]), ids.new_zeros(len(ids), table.shape[1])
    entries = F.embedding(ids, table).masked_fill(~counted.unsqueeze(2), -math.inf)
    values, places = entries.max(1)
    return values.masked_fill(~counted.any(1, keepdim=True), 0.0), ids.gather(1, places)


# -- sums and means --------------------------------------------------------------------------------------------------


def _bags(use: Use) -> tuple[Tensor, Tensor, Tensor]:  # -> (B, T, L), (B, T, L), (B, T, D)
    """Returns ids, coefficients and gradients, the bags of one example on an axis of their own."""
    ids, coefficients = use.data
    assert ids is not None
    assert coefficients is not None
    bags, length = math.prod(ids.shape[1:-1]), ids.shape[-1]
    gradient = wide(use.gradient).reshape(use.rows, bags, use.shape[1])
    ids = ids.reshape(use.rows, bags, length).long()
    return ids, of_type(coefficients, gradient.dtype).reshape(ids.shape), gradient


def _places(uses: Uses) -> tuple[Tensor, Tensor]:  # -> (B, N), (B, N, D)
    """Returns all places that were looked up in all bags, and their gradients."""
    parts = [_bags(use) for use in uses]
    ids = torch.cat([i.flatten(1) for i, _, _ in parts], dim=1)
    return ids, torch.cat([(c.unsqueeze(3) * g.unsqueeze(2)).flatten(1, 2) for _, c, g in parts], dim=1)


class _Summed(Rule):
    """The table of a weighted sum."""

    def per_example(self, uses: Uses) -> Tensor:
        return segment_rows(*_places(uses), uses.shape)

    def squared_norms(self, uses: Uses) -> Tensor:
        ids, coefficients, gradient = _bags(uses[0])
        entries = uses.shape[0]
        if len(uses) == 1 and ids.shape[1] == 1:  # one bag: the norm of an outer product
            by_entry = segment_norms(ids[:, 0], coefficients[:, 0].unsqueeze(2), entries)
            by_entry = raised(by_entry, lost(ids.shape[2], by_entry.dtype))
            return padded(by_entry * factor_norms(gradient), self.rounding(uses))
        size = 4 * (entries + sum(math.prod(use.data[0].shape[1:]) for use in uses if use.data[0] is not None))
        chunks = row_chunks(uses.rows, size * (1 + uses.shape[1]))
        norms = [segment_norms(*_places(uses.narrowed(c.start, c.stop)), entries) for c in chunks]
        # The weighted sum adds up places of one entry in another order.
        return padded(torch.cat(norms), self.rounding(uses)) if norms else gradient.new_zeros(0)

    def rounding(self, uses: Uses) -> Tensor:
        """Returns a share of the root of `L |c|^2 |g|^2`, no less than `sum_tl |c_tl| |g_t|`."""
        parts = [_bags(use) for use in uses]
        # Only the entries of an example's own bags count: were it the length of the longest bag of the batch, one
        # example with very many entries would raise the norms of all others.
        lengths = [(c != 0.0).sum(2) for _, c, _ in parts]
        coefficients = summed(
            [factor_norms(c) * n.amax(1).clamp(min=1) for (_, c, _), n in zip(parts, lengths, strict=True)]
        )
        gradients = summed([factor_norms(g) for _, _, g in parts])
        places = summed([n.sum(1).to(gradients.dtype) for n in lengths])
        return coefficients.sqrt() * gradients.sqrt() * product_errors(places, gradients.device)

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        total = wide(uses[0].gradient).new_zeros(uses.shape)
        for use in uses:
            ids, coefficients, gradient = _bags(use)
            gradient = gradient * of_type(weights, gradient.dtype).view(-1, 1, 1)
            for c in row_chunks(use.rows, 4 * ids[:1].numel() * use.shape[1]):
                _add_places(total, ids[c].flatten(0, 1), coefficients[c].flatten(0, 1), gradient[c].flatten(0, 1))
        return total


def _add_places(total: Tensor, ids: Tensor, coefficients: Tensor, gradient: Tensor) -> None:
    """Adds each bag's gradient, times the coefficients, to its entries: (N, L), (N, L), (N, D)."""
    if tracing():
        total.index_add_(0, ids.flatten(), (coefficients.unsqueeze(2) * gradient.unsqueeze(1)).flatten(0, 1))
        return
    bags, places = coefficients.nonzero(as_tuple=True)  # bags of uneven length are mostly padding
    total.index_add_(0, ids[bags, places], gradient[bags] * coefficients[bags, places].unsqueeze(1))


class WeightedBag(Operation):
    """A weighted sum of entries, by ids (B, ..., L) and coefficients of the same shape."""

    positionwise = True
    rules: Mapping[str, Rule] = {"table": _Summed()}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the sums."""
        return weighted_bag(data[0], data[1], values["table"])

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns the gradient of the coefficients: each place's entry times the bag's gradient."""
        if not needed[1]:
            return (None, None)
        ids, coefficients = data
        size = 4 * ids[:1].numel() * gradient.shape[-1]
        parts = [
            (F.embedding(ids[c], values["table"]) @ of_type(gradient[c], values["table"].dtype).unsqueeze(2)).squeeze(2)
            for c in row_chunks(len(ids), size)
        ]
        found = torch.cat(parts) if parts else torch.zeros_like(coefficients)
        return (None, of_type(found, coefficients.dtype))


# -- maxima ----------------------------------------------------------------------------------------------------------


class _Highest(Rule):
    """The table of a maximum: the gradient of each feature goes to the entry that won it."""

    def per_example(self, uses: Uses) -> Tensor:
        gradient = wide(uses[0].gradient)
        rows = gradient.new_zeros(uses.rows, *uses.shape)
        for use in uses:
            winners, g = _won(use)
            rows.scatter_add_(1, winners, g)
        return rows

    def squared_norms(self, uses: Uses) -> Tensor:
        if len(uses) == 1 and uses[0].gradient.dim() == 2:  # one bag: no two features meet in one place of the table
            return row_norms(_won(uses[0])[1])
        chunks = row_chunks(uses.rows, 4 * math.prod(uses.shape))
        norms = [row_norms(self.per_example(uses.narrowed(c.start, c.stop))) for c in chunks]
        return torch.cat(norms) if norms else wide(uses[0].gradient).new_zeros(0)

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        total = wide(uses[0].gradient).new_zeros(uses.shape)
        for use in uses:
            winners, g = _won(use)
            g = g * of_type(weights, g.dtype).view(-1, 1, 1)
            total.scatter_add_(0, winners.flatten(0, 1), g.flatten(0, 1))
        return total


def _won(use: Use) -> tuple[Tensor, Tensor]:  # -> (B, T, D), (B, T, D)
    """Returns the winning entry of each feature, and its gradient: none where the bag was empty."""
    _, counted, winners = use.data
    assert counted is not None
    assert winners is not None
    gradient = wide(use.gradient).masked_fill(~counted.any(-1, keepdim=True), 0)
    shape = (use.rows, math.prod(gradient.shape[1:-1]), use.shape[1])
    return winners.reshape(shape), gradient.reshape(shape)


class HighestOf(Operation):
    """The largest value of each feature, by ids (B, ..., L) and whether each place counts."""

    positionwise = True
    rules: Mapping[str, Rule] = {"table": _Highest()}

    def __init__(self) -> None:
        self._winners: Tensor | None = None

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the largest values, and remembers whose they are."""
        size = 4 * data[0][:1].numel() * values["table"].shape[1]
        parts = [_winners(data[0][c], data[1][c], values["table"]) for c in row_chunks(len(data[0]), size)]
        parts = parts or [_winners(data[0], data[1], values["table"])]
        self._winners = torch.cat([winners for _, winners in parts])
        return torch.cat([value for value, _ in parts])

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns none: ids are whole numbers."""
        return (None, None)

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns which places count, and the winners."""
        return (None, data[1], self._winners)


# -- from the user's call to one of the two --------------------------------------------------------------------------


@handles(weighted_bag)
def _weighted(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _applied(call, WeightedBag(), *args)


@handles(highest_of)
def _highest(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _applied(call, HighestOf(), *args)


def _applied(call: Call, operation: Operation, ids: Tensor, coefficients: Tensor, table: Tensor) -> Any:
    layout = call.layout(ids)
    if layout is not call.layout(coefficients) or layout is Layout.CONSTANT or layout.axis or table.dim() != 2:
        raise UnsupportedModelError(
            f"embedding_bag of {call.label(table)} met ids of shape {tuple(ids.shape)} in which {layout.value}, and "
            f"weights in which {call.layout(coefficients).value}. Expected the bags on axis 0, as many for each "
            "example."
        )
    return call.apply(operation, (ids, coefficients), {"table": table}, layout=layout)


@handles(F.embedding_bag, structural=True, apart=True)
def _embedding_bag(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(
        args, kwargs, input=None, weight=None, offsets=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
        mode="mean", sparse=False, per_sample_weights=None, include_last_offset=False, padding_idx=None,
    )  # fmt: skip
    if a is None or not call.is_root(a.weight) or a.input.is_floating_point() or a.weight.dim() != 2:
        return NotImplemented
    refuse_options(call, a, "embedding_bag")
    if a.per_sample_weights is not None and (a.mode != "sum" or call.is_root(a.per_sample_weights)):
        return NotImplemented  # torch refuses the one; the other has no examples in it yet
    ids, counted, weights = _square(a, call)
    if a.padding_idx is not None:
        padding = a.padding_idx + (a.weight.shape[0] if a.padding_idx < 0 else 0)
        counted = counted & (ids != padding)
    if a.mode == "max":
        return call.again(highest_of, ids, counted, a.weight)
    coefficients = counted.to(a.weight.dtype)
    if a.mode == "mean":
        coefficients = coefficients / coefficients.sum(1, keepdim=True).clamp(min=1)
    if weights is not None:
        coefficients = torch.where(counted, weights, 0.0)
    return call.again(weighted_bag, ids, coefficients, a.weight)


def _square(a: SimpleNamespace, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:  # (B, L) each
    """Returns ids, which places are of the bag, and weights, whether they came as a matrix or as a row with offsets."""
    if a.input.dim() == 2:
        return a.input, torch.ones_like(a.input, dtype=torch.bool), a.per_sample_weights
    total, starts = len(a.input), a.offsets
    if tracing():
        raise UnsupportedModelError(
            f"embedding_bag of {call.label(a.weight)} met offsets, whose lengths a compiled step cannot know. Expected "
            "ids (B, L): pad the bags, with padding_idx."
        )
    whole = starts.new_tensor([total])
    ends = starts[1:] if a.include_last_offset else torch.cat([starts[1:], whole]) if len(starts) else starts
    starts = starts[: len(ends)]
    lengths = ends - starts
    covered = not len(ends) or bool((starts[0] == 0) & (ends[-1] == total))
    if not covered or bool((lengths < 0).any()) or (not len(ends) and total):
        raise UnsupportedModelError(
            f"embedding_bag of {call.label(a.weight)} met {total} ids in one row and offsets of shape "
            f"{tuple(a.offsets.shape)} that do not cut the row into bags. Expected offsets that begin at 0 and do not "
            "fall, the last one the number of ids where include_last_offset=True."
        )
    longest = max(1, int(lengths.max())) if len(ends) else 1  # all may be empty
    places = torch.arange(longest, device=a.input.device)
    counted = places < lengths.unsqueeze(1)
    where = (starts.unsqueeze(1) + places).masked_fill(~counted, 0)
    if not total:  # every bag is empty, and there is no place to point to
        weights = None if a.per_sample_weights is None else a.per_sample_weights.new_zeros(counted.shape)
        return a.input.new_zeros(counted.shape), counted, weights
    weights = None if a.per_sample_weights is None else a.per_sample_weights[where]
    return a.input[where].masked_fill(~counted, 0), counted, weights
