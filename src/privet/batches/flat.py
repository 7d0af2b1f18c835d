"""Entries of all examples in one row, cut by offsets, as `nn.EmbeddingBag` takes them: by example in a check.

A row of N ids has no axis of examples, and offsets without their last entry are as long as the batch: an example that
is moved or copied there alone would take entries of others. So both are rearranged into tensors with the examples on
axis 0, which can be cut, copied and moved like any other, and are put together again before the model gets them.

Axes: B examples, N entries of all of them, L entries of the one that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from privet.batches.structure import parts_or_none, rebuilt
from privet.batches.tree import is_column, mapped, paths_in

__all__ = ["Bags", "as_given", "is_rearranged", "rearranged_bags"]

_NAME = "the inputs"


class Bags(NamedTuple):
    """The arguments of one call of `embedding_bag`."""

    ids: Tensor  # (N,)
    offsets: Tensor  # (B,), or (B + 1,) where the last one is N
    weights: Tensor | None  # (N,)
    last: bool  # whether the last offset is N


@dataclass
class _Entries:
    """A row of entries, by example."""

    rows: Tensor  # (B, L)
    held: Tensor  # (B, L) bool


@dataclass
class _Lengths:
    """Offsets, as the number of entries of each example."""

    lengths: Tensor  # (B,)
    last: bool


def rearranged_bags(inputs: Any, given: Any, met: Sequence[Bags], *, examples: int) -> Any | None:
    """Returns the inputs with rows and offsets by example, or None if none of them are bags of the examples.

    Args:
        inputs: what is rearranged.
        given: what a model was run on, built as the inputs are. Its tensors are told by what they are, and not by size.
        met: the calls of `embedding_bag` that the model made.
        examples: B, of the inputs.
    """
    paths = {id(leaf): path for path, leaf in paths_in(given, _NAME) if isinstance(leaf, Tensor)}
    leaves = {path: leaf for path, leaf in paths_in(inputs, _NAME) if isinstance(leaf, Tensor)}
    changed: dict[str, Any] = {}
    for bags in met:
        places = [paths.get(id(t)) for t in bags[:3]]
        if places[0] is None or places[1] is None:
            continue
        ids, offsets = leaves[places[0]], leaves[places[1]]
        if len(offsets) - bags.last != examples or not _cuts(ids, offsets, last=bags.last):
            continue
        ends = offsets[1:] if bags.last else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
        lengths = ends - offsets[:examples]
        held = torch.arange(max(int(lengths.max()), 1), device=ids.device) < lengths.unsqueeze(1).to(ids.device)
        for place in (places[0], places[2]):
            if place is not None and leaves[place].shape == ids.shape:
                rows = leaves[place].new_zeros(held.shape)
                rows[held] = leaves[place]
                changed[place] = _Entries(rows, held)
        changed[places[1]] = _Lengths(lengths, bags.last)
    return mapped(inputs, lambda leaf, path: changed.get(path, leaf), _NAME) if changed else None


def _cuts(ids: Tensor, offsets: Tensor, *, last: bool) -> bool:
    """Returns whether offsets cut a row of entries from its beginning to its end."""
    whole = not last or int(offsets[-1]) == len(ids)
    return ids.dim() == offsets.dim() == 1 and int(offsets[0]) == 0 and whole and bool((offsets.diff() >= 0).all())


def as_given(inputs: Any) -> Any:
    """Returns the inputs with rows and offsets as the model takes them."""
    if isinstance(inputs, _Entries):
        return inputs.rows[inputs.held]
    if isinstance(inputs, _Lengths):
        ends = inputs.lengths.cumsum(0)
        offsets = torch.cat([torch.zeros_like(ends[:1]), ends])
        return offsets if inputs.last else offsets[:-1]
    parts = None if is_column(inputs) else parts_or_none(inputs)
    if parts is None:
        return inputs
    new = [as_given(part) for part in parts]
    return inputs if all(n is p for n, p in zip(new, parts, strict=True)) else rebuilt(inputs, new, _NAME)


def is_rearranged(inputs: Any) -> bool:
    """Returns whether something in the inputs is by example, and not as the model takes it."""
    if isinstance(inputs, _Entries | _Lengths):
        return True
    parts = None if is_column(inputs) else parts_or_none(inputs)
    return parts is not None and any(map(is_rearranged, parts))
