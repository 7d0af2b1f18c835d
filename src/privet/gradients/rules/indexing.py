"""Indexing of a parameter by data: `table[ids]`, `table[a, b]`, `table[:, ids]` and `index_select`, as lookups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privet.gradients.isometries import INDEX_SELECT
from privet.gradients.layout import Layout
from privet.gradients.rules.arguments import named
from privet.gradients.rules.embedding import Lookup
from privet.gradients.rules.registry import Call, handles

__all__ = ["LookupOfSeveral"]

_WHOLE = (torch.int64, torch.int32)


class LookupOfSeveral(Lookup):
    """Entries of a table of several axes, by the place along each, the table given with those axes as one.

    Args:
        sizes: the lengths of these axes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self._sizes = tuple(sizes)

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the entries, after torch's own look at the places."""
        table = values["table"]
        return table.reshape(*self._sizes, *table.shape[1:])[tuple(data)]

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns the places along the one axis."""
        places = torch.zeros_like(data[0], dtype=torch.int64)
        for ids, size in zip(data, self._sizes, strict=True):
            places = places * size + torch.where(ids < 0, ids + size, ids)
        return (places,)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns none: places are whole numbers."""
        return (None,) * len(data)


@handles(Tensor.__getitem__)
def _getitem(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, ids = args
    if isinstance(ids, tuple) and len(ids) == 1:
        (ids,) = ids
    if isinstance(ids, tuple):
        return _indexed_by_several(call, table, ids)
    return _indexed(call, table, ids)


@handles(INDEX_SELECT, Tensor.index_select)
def _index_select(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a = named(args, kwargs, input=None, dim=None, index=None)
    if a is None or a.dim not in (0, -a.input.dim()):
        return NotImplemented
    return _indexed(call, a.input, a.index)


def _indexed(call: Call, table: Any, ids: Any) -> Any:
    if not call.is_root(table) or not isinstance(ids, Tensor) or ids.dtype not in _WHOLE:
        return NotImplemented
    if table.dim() < 1 or ids.dim() < 1:
        return NotImplemented
    return call.apply(Lookup(counts_from_end=True), (ids,), {"table": table})


def _indexed_by_several(call: Call, table: Any, ids: tuple[Any, ...]) -> Any:
    """`table[a, b]`: one lookup in the table with its first axes as one. `table[:, a]`: a lookup along another axis."""
    tensors = [t for t in ids if isinstance(t, Tensor)]
    if not call.is_root(table) or not all(t.dtype in _WHOLE and not call.is_root(t) and t.dim() for t in tensors):
        return NotImplemented
    place = next((i for i, t in enumerate(ids) if isinstance(t, Tensor)), None)
    if len(tensors) == 1 and all(type(p) is slice and p == slice(None) for p in ids if not isinstance(p, Tensor)):
        found = _indexed(call, call.again(Tensor.movedim, table, place, 0), tensors[0])
        return found.movedim(tuple(range(tensors[0].dim(), found.dim()))[:place], tuple(range(place or 0)))
    if len(tensors) != len(ids) or len(ids) > table.dim() or call.layout(tensors[0]) is Layout.ROUTED:
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    data = [t for t in tensors if call.layout(t) is not Layout.CONSTANT]
    if not data or any(t.dim() != len(shape) or call.layout(t) is not call.layout(data[0]) for t in data):
        return NotImplemented
    one = call.again(Tensor.flatten, table, 0, len(ids) - 1)
    operation = LookupOfSeveral(table.shape[: len(ids)])
    return call.apply(operation, [t.expand(shape) for t in tensors], {"table": one}, layout=call.layout(data[0]))
