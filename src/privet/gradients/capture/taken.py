"""Which rows a call takes, and where it puts rows: read from the index that it was given.

    h[order], h.index_select(axis, order)       row j is row order[j]
    h[mask], h[2:5], h.split(3), h.sort()       rows of `h`, in another order or not all
    out.index_add(0, index, rows), out[i] = h   row j is put to row index[j]

Axes: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from privet.gradients.capture.kept import named
from privet.gradients.capture.routing import Routed

__all__ = ["ADDS", "TAKES", "WHOLE", "index_of_rows", "is_whole", "taken"]

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)
ADDS = frozenset({"index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce"})
"""Functions that put rows where an index says."""
TAKES = frozenset(
    {"__getitem__", "index_select", "gather", "sort", "argsort", "split", "chunk", "narrow", "repeat_interleave"}
)
"""Functions that take rows."""


def index_of_rows(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], container: Tensor, rows: int
) -> Tensor | None:  # (R,)
    """Returns the places along axis 0 that rows are put into, or None if it is not as simple as that."""
    if name in ADDS:
        axis, index = named(args, kwargs, 1, "dim"), named(args, kwargs, 2, "index")
        if axis % container.dim() != 0 or not isinstance(index, Tensor):
            return None
        if index.dim() > 1:  # one index for a whole row
            if any(stride and size > 1 for stride, size in zip(index.stride()[1:], index.shape[1:], strict=True)):
                return None
            index = index.flatten(1)[:, 0] if index.numel() else index.new_zeros(0)
    else:
        index = args[1]
        if isinstance(index, tuple | list) and name == "index_put" and len(index) == 1:
            index = index[0]
        if isinstance(index, slice):
            index = torch.arange(container.shape[0], device=container.device)[index]
        if not isinstance(index, Tensor) or index.dim() != 1:
            return None
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
    return index.long() if index.dtype in WHOLE and index.shape[0] == rows else None


def taken(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Routed, result: Any
) -> list[tuple[Tensor, Routed]] | None:
    """Returns the owners of rows that are taken along their axis, or None if they are taken otherwise, or not at all.

    Args:
        name: of the function, as `base_name` says it.
        args: what it was given.
        kwargs: and by name.
        source: the owners of the rows of its first argument.
        result: what it returned.
    """
    t = args[0]
    found: Routed | None = None
    if name == "__getitem__":
        found = _indexed(args[1], source) if source.axis == 0 else _indexed_behind(args[1], source)
    elif name in {"sort", "argsort"}:
        order = result if isinstance(result, Tensor) else result[1]
        if t.dim() == 1:
            found = source.taken(order)
    else:
        place = {"split": 2, "chunk": 2, "repeat_interleave": 2}.get(name, 1)
        axis = named(args, kwargs, place, "dim", default=0 if name in {"split", "chunk"} else None)
        if axis is None or axis % t.dim() != source.axis:
            return None
        if name in {"split", "chunk", "narrow"}:
            pieces = (result,) if isinstance(result, Tensor) else tuple(result)
            return _pieces(pieces, source, int(named(args, kwargs, 2, "start")) if name == "narrow" else 0)
        by = named(args, kwargs, 3 - place, "repeats", "index")
        if name == "repeat_interleave":
            found = Routed(source.owner.repeat_interleave(by), origin=source, axis=source.axis)
        elif by.dim() == 1 and (name == "index_select" or t.dim() == 1):
            found = source.taken(by)
    if found is None:
        return None
    tensors = [result] if isinstance(result, Tensor) else list(result)
    fits = all(each.shape[found.axis : found.axis + 1] == (found.rows,) for each in tensors)
    return [(each, found) for each in tensors] if fits else None


def _pieces(pieces: tuple[Tensor, ...], source: Routed, start: int) -> list[tuple[Tensor, Routed]]:
    found = []
    for piece in pieces:
        stop = start + piece.shape[source.axis]
        found.append((piece, source.taken(slice(start, stop))))
        start = stop
    return found


def _indexed(index: Any, source: Routed) -> Routed | None:
    """Returns the owners of `t[index]`, if its first axis is rows that the first part of the index takes."""
    items = index if isinstance(index, tuple) else (index,)
    if items[0] is None:  # a new axis in front: the rows lie behind it
        found = _indexed(items[1:], source) if len(items) > 1 else None
        return None if found is None else found.on_axis(found.axis + 1)
    first, rest = items[0], items[1:]
    if isinstance(first, slice):
        whole = first.indices(source.rows) == (0, source.rows, 1)
        return None if whole or any(isinstance(item, Tensor) for item in rest) else source.taken(first)
    if not isinstance(first, Tensor) or first.dim() != 1:
        return None
    if first.dtype == torch.bool:
        return source.taken(first) if all(item is Ellipsis or item == slice(None) for item in rest) else None
    for item in rest:  # several tensors next to each other index together, and give one axis
        together = isinstance(item, Tensor) and item.shape == first.shape and item.dtype in WHOLE
        if not together and item is not None and item is not Ellipsis and item != slice(None):
            return None
    kinds = [isinstance(item, Tensor) for item in items]
    adjacent = kinds.index(False) if False in kinds else len(kinds)
    return source.taken(first) if first.dtype in WHOLE and sum(kinds) == adjacent else None


def _indexed_behind(index: Any, source: Routed) -> Routed | None:
    """Returns the owners of `t[:, index]` and its like, in which one list takes rows along their axis."""
    items = index if isinstance(index, tuple) else (index,)
    lists = [place for place, item in enumerate(items) if not is_whole(item)]
    item = items[lists[0]] if len(lists) == 1 else None
    if lists != [source.axis] or any(each is Ellipsis for each in items[: source.axis]):
        return None
    return source.taken(item) if isinstance(item, Tensor) and item.dim() == 1 and item.dtype in WHOLE else None


def is_whole(item: Any) -> bool:
    """Returns whether an item of an index takes all of an axis, or of several."""
    return item is Ellipsis or (isinstance(item, slice) and item == slice(None))
