"""Functions that leave rows in their order on an axis that is not axis 0, or put them from one axis onto another.

    last[-1], last.squeeze(0), x.transpose(0, 1), h[None, order].reshape(-1, D)
                                                    views: the same rows on the axis where they are then
    last + 1, last.tanh()                           functions of each element of tensors of one shape

`kept.py` says what becomes of rows on axis 0 that stay there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from privet.gradients.capture.call import tensors_among
from privet.gradients.capture.kept import ALIKE, Owners, one_of
from privet.gradients.capture.routing import Routed
from privet.gradients.capture.taken import is_whole
from privet.gradients.rules.arguments import named

__all__ = ["kept_behind", "viewed"]

_VIEWS = frozenset({"__getitem__", "squeeze", "transpose", "view", "reshape"})


def viewed(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, source: Routed | None
) -> list[tuple[Tensor, Routed]] | None:
    """Returns a view with the owners of its rows, on whichever axis all of them are now, or None if that is not so."""
    if source is None or name not in _VIEWS or not isinstance(result, Tensor):
        return None
    axis = _axis_after(name, source.axis, args, kwargs, result)
    return None if axis is None else [(result, source.on_axis(axis))]


def kept_behind(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, of: Owners
) -> list[tuple[Tensor, Routed]] | None:
    """Returns a result with the owners of its rows, where some arguments have theirs on an axis that is not axis 0."""
    met = [(t, mine) for t in tensors_among((*args, *kwargs.values())) if (mine := of(t)) is not None]
    if name in ALIKE and isinstance(result, Tensor) and all(t.shape == result.shape for t, _ in met):
        mine = one_of([mine for _, mine in met])
        return None if mine is None else [(result, mine)]
    return None


def _axis_after(name: str, axis: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """Returns the axis of a view on which entries lie that were on `axis`, or None if not all of them do."""
    t = args[0]
    if name in {"view", "reshape"}:  # axes of one in front are left out
        alone = all(size == 1 for size in t.shape[:axis])
        return 0 if alone and result.dim() and result.shape[0] == t.shape[axis] else None
    if name == "squeeze":
        return axis - 1 if axis and t.shape[0] == 1 and result.shape == t.shape[1:] else None
    if name == "transpose":
        a = named(args, kwargs, input=None, dim0=0, dim1=0)
        swapped = {} if a is None else {a.dim0 % t.dim(): a.dim1 % t.dim(), a.dim1 % t.dim(): a.dim0 % t.dim()}
        return None if a is None else swapped.get(axis, axis)
    items = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    if any(item is Ellipsis for item in items):
        place = next(place for place, item in enumerate(items) if item is Ellipsis)
        left = t.dim() - sum(item is not None for item in items) + 1
        items[place : place + 1] = [slice(None)] * left
    old = new = 0
    for item in items:
        if item is None:
            new += 1
        elif old == axis:
            return new if is_whole(item) else None
        elif isinstance(item, int | slice) and not isinstance(item, bool):
            old, new = old + 1, new + isinstance(item, slice)
        else:
            return None  # indices by tensors change the order of the axes
    return new + axis - old
