"""Lookups of rows in a table: `F.embedding`, and what indexing comes to (`indexing.py`).

Axes: B examples, T positions (all axes of one example's ids), V entries of the table, D features (all axes of one
entry). One example's gradient is zero but for the entries that it looked up, so its norm is found over these alone:
positions with the same id add up before they are squared, and a table of B x V x D never exists.
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
from privet.gradients.precision import product_errors
from privet.gradients.rows import padded, wide
from privet.gradients.rules.arguments import named
from privet.gradients.rules.pool import scratch
from privet.gradients.rules.registry import Call, handles
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["Lookup", "looked_up", "refuse_options", "segment_norms", "segment_rows"]

_MANY_REPEATED = 0.25
"""The share of repeated positions above which all positions are summed by entry, not the repeated ones alone."""


def _looked_up(use: Use) -> tuple[Tensor, Tensor]:  # -> ids (B, T), gradient (B, T, D)
    """Returns ids and gradients of one use as sequences; ids of entries that do not learn have a gradient of zero."""
    (ids,) = use.data
    assert ids is not None
    assert isinstance(use.operation, Lookup)
    entries = use.shape[0]
    positions, features = math.prod(ids.shape[1:]), math.prod(use.shape[1:])
    ids = ids.reshape(use.rows, positions).long()
    gradient = wide(use.gradient).reshape(use.rows, positions, features)
    ids = torch.where(ids < 0, ids + entries, ids) if use.operation.counts_from_end else ids
    if (padding := use.operation.padding) is not None:
        gradient = gradient.masked_fill((ids == padding).unsqueeze(2), 0)
    return ids, gradient


def looked_up(uses: Uses) -> tuple[Tensor, Tensor]:  # -> ids (B, T), gradient (B, T, D)
    """Returns ids and gradients of all uses, one after the other along T."""
    pairs = [_looked_up(use) for use in uses]
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([i for i, _ in pairs], dim=1), torch.cat([g for _, g in pairs], dim=1)


def _squares(vectors: Tensor) -> Tensor:  # (N, D) -> (N,)
    """Returns the squared norm of each vector."""
    if vectors.shape[1] >= 64:
        norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
        return norms.square()
    products: Tensor = torch.mul(vectors, vectors, out=scratch(vectors.shape, vectors))
    return products.sum(1)


class _Table(Rule):
    """The table: each position's gradient belongs to the entry that it looked up."""

    def per_example(self, uses: Uses) -> Tensor:
        return segment_rows(*looked_up(uses), uses.shape)

    def squared_norms(self, uses: Uses) -> Tensor:
        ids, gradient = looked_up(uses)
        rows, entries = gradient.shape[0], uses.shape[0]
        if gradient.shape[1] <= 1 or not gradient.numel():
            return _squares(gradient.flatten(0, 1)).view(gradient.shape[:2]).sum(1)
        norms = [segment_norms(ids[c], gradient[c], entries) for c in row_chunks(rows, 4 * entries)]
        return torch.cat(norms)

    def inner_products(self, uses: Uses, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `sum_ts (gradient_t . right_s) left[s, id_t]`, S positions of the other use: no table is formed."""
        ids, gradient = looked_up(uses)
        alike = torch.bmm(gradient.to(right.dtype), right.mT)  # (B, T, S)
        picked = left.mT.gather(1, ids.unsqueeze(2).expand(-1, -1, left.shape[1]))  # (B, T, S)
        lengths = (
            torch.linalg.vector_norm(gradient, dim=2).unsqueeze(2) * torch.linalg.vector_norm(right, dim=2)[:, None]
        )
        return (alike * picked).flatten(1).sum(1), (lengths.to(picked.dtype) * picked.abs()).flatten(1).sum(1)

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        for use in uses:
            ids, gradient = _looked_up(use)
            if total is None:
                total = gradient.new_zeros(use.shape[0], gradient.shape[2])
            scaled = torch.mul(
                gradient, weights.to(gradient.dtype).view(-1, 1, 1), out=scratch(gradient.shape, gradient)
            )
            total.index_add_(0, ids.flatten(), scaled.flatten(0, 1))
        assert total is not None
        return total.view(uses.shape)


def segment_rows(ids: Tensor, gradient: Tensor, shape: Sequence[int]) -> Tensor:  # (B, T), (B, T, D) -> (B, *shape)
    """Returns the sums by entry, of all positions of one example that share an id, as tables."""
    rows, positions, features = gradient.shape
    entries = shape[0]
    flat = (ids + entries * torch.arange(rows, device=ids.device).unsqueeze(1)).flatten()
    table = gradient.new_zeros(rows * entries, features)
    return table.index_add_(0, flat, gradient.reshape(rows * positions, features)).view(rows, *shape)


def segment_norms(ids: Tensor, gradient: Tensor, entries: int) -> Tensor:  # (B, T), (B, T, D) -> (B,)
    """Returns the squared norms of the sums by entry, of all positions of one example that share an id.

    A map from entry to position, written in any order, gives each id one representative position: whichever wrote
    last. Only places just written are read, so the map is never cleared. Positions that are their own representative
    and represent no other are squared as they are. Where positions are added up, the weighted sum will do so in another
    order, and the norms are padded for that.
    """
    rows, positions, features = gradient.shape
    own = torch.arange(positions, dtype=torch.int32, device=ids.device).expand(rows, positions).contiguous()
    representative = scratch((rows, entries), own).scatter_(1, ids, own).gather(1, ids)
    repeated = None if tracing() else (representative != own).flatten().nonzero()[:, 0]
    flat = gradient.reshape(rows * positions, features)
    count = flat.shape[0] if repeated is None else repeated.shape[0]
    if repeated is None or count > _MANY_REPEATED * flat.shape[0]:
        starts = torch.arange(rows, device=ids.device).unsqueeze(1) * positions
        sums = scratch(flat.shape, flat).zero_().index_add_(0, (representative + starts).flatten(), flat)
        return _reordered(_squares(sums).view(rows, positions), _squares(flat).view(rows, positions))
    own_copy = flat.data_ptr() != gradient.data_ptr()  # so it is where one gradient is spread over the positions
    if count and own_copy:
        heads, before = _heads(representative, repeated, positions), _squares(flat)
        flat.index_add_(0, heads, flat[repeated])
        after = _squares(flat).index_fill_(0, repeated, 0.0)
        return _reordered(after.view(rows, positions), before.view(rows, positions))
    squares = _squares(flat)
    if not count:
        return squares.view(rows, positions).sum(1)
    heads = _heads(representative, repeated, positions)
    heads, place = torch.unique(heads, return_inverse=True)
    sums = flat[heads].index_add_(0, place, flat[repeated])
    after = squares.index_fill(0, repeated, 0.0).index_copy(0, heads, _squares(sums))
    return _reordered(after.view(rows, positions), squares.view(rows, positions))


def _reordered(after: Tensor, before: Tensor) -> Tensor:  # (B, T), (B, T) -> (B,)
    """Returns the squared norms, padded for sums of terms of the sizes `before` that are added up in another order."""
    positions = (before != 0.0).sum(1).to(before.dtype)  # its own, not zeros that fill up
    share = positions.sqrt() * product_errors(positions, after.device)
    return padded(after.sum(1), before.sum(1).sqrt() * share)


def _heads(representative: Tensor, repeated: Tensor, positions: int) -> Tensor:  # (N,): indices over (B, T)
    """Returns the representatives of the repeated positions."""
    return representative.flatten()[repeated] + repeated // positions * positions


class Lookup(Operation):
    """Rows of a table, by ids of any shape (B, ...)."""

    positionwise = True
    sequences = True
    rules: Mapping[str, Rule] = {"table": _Table()}

    def __init__(self, *, padding: int | None = None, counts_from_end: bool = False) -> None:
        self.padding = padding
        self.counts_from_end = counts_from_end

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the entries looked up."""
        if self.counts_from_end:
            return values["table"][data[0]]
        return F.embedding(data[0], values["table"])

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns none: ids are whole numbers."""
        return (None,)


@handles(F.embedding)
def _embedding(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(
        args, kwargs, input=None, weight=None, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
        sparse=False,
    )  # fmt: skip
    if a is None or not call.is_root(a.weight):
        return NotImplemented
    return _applied(call, a, a.input, a.padding_idx)


@handles(torch.embedding)
def _builtin(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(
        args, kwargs, weight=None, indices=None, padding_idx=-1, scale_grad_by_freq=False, sparse=False, max_norm=None
    )
    if a is None:
        return NotImplemented
    return _applied(call, a, a.indices, None if a.padding_idx < 0 else a.padding_idx)


def refuse_options(call: Call, a: SimpleNamespace, operation: str) -> None:
    """Raises where an option would write data into the table, or mix examples, or leave entries without noise."""
    if a.max_norm is not None:
        raise UnsupportedModelError(
            f"{operation} of {call.label(a.weight)} has max_norm={a.max_norm}: each forward would rescale the entries "
            "that the batch looks up, which writes the data into the weights without noise. Expected max_norm=None. "
            "Drop it, and rescale the whole table after the step if need be."
        )
    if a.scale_grad_by_freq:
        raise UnsupportedModelError(
            f"{operation} of {call.label(a.weight)} has scale_grad_by_freq=True: an example's gradient would depend on "
            "which ids the other examples of the batch have. Expected False."
        )
    if a.sparse:
        raise UnsupportedModelError(
            f"{operation} of {call.label(a.weight)} has sparse=True. A private gradient is dense: entries that nobody "
            "looked up get noise too, or who was in the batch would show. Expected sparse=False."
        )


def _applied(call: Call, a: SimpleNamespace, ids: Any, padding: int | None) -> Any:
    """Returns the captured lookup, or NotImplemented if it is not one."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not call.is_root(a.weight) or a.weight.dim() != 2:
        return NotImplemented
    refuse_options(call, a, "embedding")
    if padding is not None and padding < 0:
        padding += a.weight.shape[0]
    return call.apply(Lookup(padding=padding), (ids,), {"table": a.weight})
