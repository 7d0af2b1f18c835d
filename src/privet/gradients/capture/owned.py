"""Which rows of a forward have owners of their own, from the rows that are taken by an index to where they come back.

    h[order], nodes.index_select(0, source)     row j is owner[index[j]]'s
    what `kept.py` knows of                     the owners stay
    edges[1], edges[:, mask]                    the same numbers of nodes, in other places
    out.index_add(0, index, rows)               row i is that of the rows that were added to it
    anything else                               nobody knows any more

Nothing is guessed. A batch of graphs tells whose its rows are, and which rows its edges number. Rows that are taken
from a tensor that lies as the batch does (as the check has seen of this place in the code) have their owners by place.
A row that nothing is put into belongs to the example of the row that its number stands for, or that it was taken from.
If several answers are possible, there is none.

Axes: B examples, R rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from privet.batches.graphs import RowsTold
from privet.gradients.capture.call import tensors_among
from privet.gradients.capture.kept import FRESH, Owners, base_name, kept, named
from privet.gradients.capture.routing import Routed

__all__ = ["OwnedRows"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8)
_MOVES_ENTRIES = frozenset(
    "__getitem__ select index_select unbind split chunk narrow cat concat stack view reshape expand expand_as squeeze "  # noqa: SIM905 - as they read
    "unsqueeze contiguous clone detach to long flip t transpose".split()
)
_ADDS = frozenset({"index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce"})
_TAKES = frozenset(
    {"__getitem__", "index_select", "gather", "sort", "argsort", "split", "chunk", "narrow", "repeat_interleave"}
)


class OwnedRows:
    """The tensors of one forward whose rows have owners of their own.

    Args:
        batch_first: whether axes merged with the batch have the batch outside.
    """

    def __init__(self, *, batch_first: bool = True) -> None:
        self._batch_first = batch_first
        self._found: dict[int, tuple[weakref.ref[Tensor], Routed]] = {}
        self._told: dict[int, list[Routed]] = {}  # by their number of rows
        self._numbers: dict[int, tuple[weakref.ref[Tensor], Routed]] = {}  # whose entries number known rows
        self._by_place: dict[tuple[int, torch.device], Routed] = {}
        self._examples = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    def begin(self, examples: int, told: Iterable[RowsTold] = ()) -> None:
        """Forgets what was known, and takes note of what is told."""
        self.clear()
        self._examples = examples
        made: dict[int, Routed] = {}

        def routed_of(owner: Tensor) -> Routed:
            if id(owner) not in made:
                made[id(owner)] = Routed(owner)
                made[id(owner)].require_examples(examples)
            return made[id(owner)]

        for t, owner, numbers_of in told:
            if owner is not None:
                self._own(t, routed_of(owner))
            if numbers_of is not None:
                self._numbers[id(t)] = (weakref.ref(t), routed_of(numbers_of))
        for routed in made.values():
            alike = self._told.setdefault(routed.rows, [])
            if not any(map(routed.same, alike)):
                alike.append(routed)

    def clear(self) -> None:
        """Forgets the forward."""
        self._found.clear()
        self._numbers.clear()
        self._told.clear()
        self._by_place.clear()

    def of(self, t: object) -> Routed | None:
        """Returns the owners of the rows of a tensor, or None if they lie by place or nobody knows them."""
        found = self._found.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def among(self, tensors: Iterable[Tensor]) -> bool:
        """Returns whether the rows of one of these have owners of their own."""
        return any(self.of(t) is not None for t in tensors)

    def forget(self, t: Tensor) -> None:
        """Takes note that nobody knows the owners of a tensor's rows any more."""
        self._found.pop(id(t), None)

    def may_take(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Returns whether a function takes rows of its first argument, of which there are as many for each example."""
        t = args[0] if args else None
        takes = base_name(func) in _TAKES and isinstance(t, Tensor) and t.dim() > 0
        return takes and bool(self._examples) and t.shape[0] % self._examples == 0  # type: ignore[union-attr]

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        *,
        by_place: bool,
        table: bool = False,
    ) -> bool:
        """Takes note of the owners of the rows of a result, and returns whether they are known, or are no matter.

        Args:
            func: what was called.
            args: with what.
            kwargs: and with what by name.
            result: what it returned.
            by_place: whether the rows of the first argument lie as the batch does, and the function takes some of them.
            table: whether the rows of the first argument are nobody's, such as those of a parameter.
        """
        name = base_name(func)
        if name in FRESH:
            return True
        if name in _ADDS or name in {"__setitem__", "index_put"}:
            return self._put(name, args, kwargs, result)
        of: Owners = self.of
        source = self.of(args[0]) if args else None
        if by_place and source is None:
            source = self._in_order(args[0].shape[0], args[0].device)
        if source is None and table and name in {"__getitem__", "index_select"}:
            index = args[1] if name == "__getitem__" else named(args, kwargs, 2, "index")
            looked_up = self.of(index)
            if looked_up is not None and isinstance(result, Tensor) and result.shape[:1] == (looked_up.rows,):
                return self._owned([(result, looked_up)])
        if source is not None and name in _TAKES:
            found = _taken(name, args, kwargs, source, result)
            if found is not None:
                return self._owned(found, restores=source)
        return not by_place and self._owned(kept(name, args, kwargs, result, of))

    def follow_numbers(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """Takes note of a result whose entries are numbers of rows, moved from a tensor of such numbers."""
        if not self._numbers or not args:
            return
        name = base_name(func)
        if name not in _MOVES_ENTRIES:
            if result is args[0] or name == "__setitem__":  # written in place: its entries may be other numbers now
                self._numbers.pop(id(args[0]), None)
            return
        sources = list(tensors_among(args[:1]))
        found = [each for t in sources if (each := self._number(t)) is not None]
        if found and all(each is found[0] for each in found):
            for t in tensors_among((result,)):
                if not t.is_floating_point():
                    self._numbers[id(t)] = (weakref.ref(t), found[0])

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _in_order(self, rows: int, device: torch.device) -> Routed:
        key = (rows, device)
        if key not in self._by_place:
            first = self._batch_first
            self._by_place[key] = Routed.in_order(rows, self._examples, device=device, batch_first=first)
        return self._by_place[key]

    def _number(self, t: object) -> Routed | None:
        """Returns the rows that the entries of a tensor are numbers of, if that is known."""
        found = self._numbers.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def _own(self, t: Tensor, routed: Routed) -> None:
        self._found[id(t)] = (weakref.ref(t), routed)

    def _owned(self, found: list[tuple[Tensor, Routed]] | None, *, restores: Routed | None = None) -> bool:
        """Takes note of owners; of none where rows that were taken out of their places are back in all of them."""
        if found is None:
            return False
        for t, routed in found:
            back = restores is not None and restores.origin is not None and routed.rows == restores.rows
            if back and routed.first_origin.by_place and routed.same(self._in_order(routed.rows, t.device)):
                self.forget(t)
            else:
                self._own(t, routed)
        return True

    # -- put ---------------------------------------------------------------------------------------------------------

    def _put(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> bool:
        """Takes note of the owners of what rows are put into, and returns whether they are known."""
        at = 2 if name in {"__setitem__", "index_put"} else 3
        container, value = args[0], named(args, kwargs, at, "source", "src", "values", "value")
        written = container if name == "__setitem__" else result
        mine = self.of(container)
        theirs = self.of(value) if isinstance(value, Tensor) else None
        if theirs is None:
            if mine is None:
                return False
            self._own(written, mine)  # constants, or what other checks look at: rows keep their places
            return True
        index = _index_of_rows(name, args, kwargs, container, theirs.rows)
        if index is None:
            return False
        if mine is not None:
            known = mine if theirs.same(mine.taken(index)) else None
        else:
            numbered = self._number(named(args, kwargs, 2, "index") if name in _ADDS else args[1])
            known = self._destination(container.shape[0], index, theirs, numbered)
        if known is None:
            return False
        if known.by_place:
            self.forget(written)
        else:
            self._own(written, known)
        return True

    def _destination(self, rows: int, index: Tensor, theirs: Routed, numbered: Routed | None) -> Routed | None:
        """Returns the owners of rows into which others are put, or None if they are not certain."""
        owner = index.new_full((rows,), -1, dtype=torch.int64)
        owner[index] = theirs.owner
        if not torch.equal(owner[index], theirs.owner):  # one row of two examples
            return None
        origin, reached = theirs.origin, owner >= 0

        def fits(other: Routed) -> bool:
            return torch.equal(torch.where(reached, other.owner, owner), owner)

        if numbered is not None and numbered.rows == rows:
            return numbered if fits(numbered) else None
        back = origin is not None and origin.rows == rows and fits(origin)
        if origin is not None and back and (origin.by_place or (theirs.by_index and rows != self._examples)):
            return origin
        known = [other for other in self._told.get(rows, ()) if fits(other)]
        if rows == self._examples and fits(each := self._in_order(rows, index.device)):
            known.append(each)
        if known and all(map(known[0].same, known[1:])):
            return known[0]
        return Routed(owner, origin=origin) if not known and bool(reached.all()) else None


def _index_of_rows(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], container: Tensor, rows: int
) -> Tensor | None:  # (R,)
    """Returns the places along axis 0 that rows are put into, or None if it is not as simple as that."""
    if name in _ADDS:
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
    return index.long() if index.dtype in _WHOLE and index.shape[0] == rows else None


def _taken(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Routed, result: Any
) -> list[tuple[Tensor, Routed]] | None:
    """Returns the owners of rows that are taken along axis 0, or None if they are taken otherwise, or not at all."""
    t = args[0]
    found: Routed | None = None
    if name == "__getitem__":
        found = _indexed(args[1], source)
    elif name in {"sort", "argsort"}:
        order = result if isinstance(result, Tensor) else result[1]
        if t.dim() == 1:
            found = source.taken(order)
    elif name in {"split", "chunk", "narrow"}:
        place = 1 if name == "narrow" else 2
        axis = named(args, kwargs, place, "dim", default=0)
        if axis % t.dim() == 0:
            pieces = (result,) if isinstance(result, Tensor) else tuple(result)
            start = named(args, kwargs, 2, "start") if name == "narrow" else 0
            return _pieces(pieces, source, int(start))
    else:
        axis = named(args, kwargs, 2 if name == "repeat_interleave" else 1, "dim")
        by = named(args, kwargs, 1 if name == "repeat_interleave" else 2, "repeats", "index")
        if axis is None or axis % t.dim() != 0:
            return None
        if name == "repeat_interleave":
            found = Routed(source.owner.repeat_interleave(by), origin=source)
        elif by.dim() == 1 and (name == "index_select" or t.dim() == 1):
            found = source.taken(by)
    if found is None:
        return None
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [(each, found) for each in tensors] if all(each.shape[:1] == (found.rows,) for each in tensors) else None


def _pieces(pieces: tuple[Tensor, ...], source: Routed, start: int) -> list[tuple[Tensor, Routed]]:
    found = []
    for piece in pieces:
        stop = start + piece.shape[0]
        found.append((piece, source.taken(slice(start, stop))))
        start = stop
    return found


def _indexed(index: Any, source: Routed) -> Routed | None:
    """Returns the owners of `t[index]`, if its first axis is rows that the first part of the index takes."""
    items = index if isinstance(index, tuple) else (index,)
    first, rest = items[0], items[1:]
    if isinstance(first, slice):
        whole = first.indices(source.rows) == (0, source.rows, 1)
        return None if whole or any(isinstance(item, Tensor) for item in rest) else source.taken(first)
    if not isinstance(first, Tensor) or first.dim() != 1:
        return None
    if first.dtype == torch.bool:
        return source.taken(first) if all(item is Ellipsis or item == slice(None) for item in rest) else None
    for item in rest:  # several tensors next to each other index together, and give one axis
        together = isinstance(item, Tensor) and item.shape == first.shape and item.dtype in _WHOLE
        if not together and item is not None and item is not Ellipsis and item != slice(None):
            return None
    kinds = [isinstance(item, Tensor) for item in items]
    adjacent = kinds.index(False) if False in kinds else len(kinds)
    return source.taken(first) if first.dtype in _WHOLE and sum(kinds) == adjacent else None
