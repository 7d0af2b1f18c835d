"""Which rows of a forward have owners of their own, from where they are taken, or packed, to where they come back.

    h[order], nodes.index_select(0, source)     row j is owner[index[j]]'s (`taken.py`)
    pack_padded_sequence, lstm                  rows by time (`packing.py`)
    what `kept.py` knows of                     the owners stay
    what `other_axes.py` knows of               they stay, and may lie on another axis
    edges[1], edges[:, mask]                    the same numbers of nodes, in other places
    out.index_add(0, index, rows)               row i is that of the rows that were added to it
    anything else                               nobody knows any more, of what it wrote in place either

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
from privet.gradients.capture.kept import FRESH, base_name, kept, named
from privet.gradients.capture.moves import Move
from privet.gradients.capture.other_axes import kept_behind, viewed
from privet.gradients.capture.packing import PACKS, axis_packed, through_packing
from privet.gradients.capture.routing import Routed
from privet.gradients.capture.taken import ADDS, TAKES, index_of_rows, taken
from privet.gradients.turned import Turned

__all__ = ["OwnedRows"]

_MOVES_ENTRIES = frozenset(
    "__getitem__ select index_select unbind split chunk narrow cat concat stack view reshape expand expand_as squeeze "  # noqa: SIM905 - as they read
    "unsqueeze contiguous clone detach to long flip t transpose".split()
)
_TAKES_BEHIND = frozenset({"__getitem__", "index_select"})
"""Functions whose rows are followed on other axes than axis 0, too."""

_CUTS = frozenset({"__getitem__", "split", "chunk", "narrow"})


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
        self._by_place: dict[tuple[int, torch.device, int, Turned | None], Routed] = {}
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
                self.put(t, routed_of(owner))
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

    def put(self, t: Tensor, routed: Routed) -> None:
        """Takes note of the owners of a tensor's rows."""
        self._found[id(t)] = (weakref.ref(t), routed)

    def forget(self, t: Tensor) -> None:
        """Takes note that nobody knows the owners of a tensor's rows any more."""
        self._found.pop(id(t), None)

    def forget_written(self, written: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        """Takes note that nobody knows the owners of what a call was given and has written to in place."""
        ids = set(map(id, given))
        for t in written:
            if id(t) in ids:
                self.forget(t)

    def takes_along(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], move: Move
    ) -> int | None:
        """Returns the axis along which a function takes rows of its first argument, or None if it does not.

        On axis 0 there are as many rows for each example, on other axes one.
        """
        t, name = args[0] if args else None, base_name(func)
        if not isinstance(t, Tensor) or not t.dim() or not self._examples:
            return None
        if name == PACKS:
            axis = axis_packed(args, kwargs)
            return axis if axis is not None and t.shape[axis] == self._examples else None
        axes = move.axes or ()
        if name in TAKES and 0 in axes:
            return 0 if t.shape[0] % self._examples == 0 else None
        alone = name in _TAKES_BEHIND and len(axes) == 1 and t.shape[axes[0]] == self._examples
        return axes[0] if alone else None

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        *,
        by_place: int | None,
        table: bool = False,
        order: Turned | None = None,
    ) -> bool:
        """Takes note of the owners of the rows of a result, and returns whether they are known, or are no matter.

        Args:
            func: what was called.
            args: with what.
            kwargs: and with what by name.
            result: what it returned.
            by_place: the axis of the first argument whose rows lie as the batch does, of which some are taken, or None.
            table: whether the rows of the first argument are nobody's, such as those of a parameter.
            order: of the rows that lie as the batch does, if it is not the usual one.
        """
        name = base_name(func)
        if name in FRESH:
            return True
        if name in ADDS or name in {"__setitem__", "index_put"}:
            return self._put(name, args, kwargs, result)
        source = self.of(args[0]) if args else None
        starts = source is None and by_place is not None
        if source is None and by_place is not None:
            source = self._in_order(args[0].shape[by_place], args[0].device, axis=by_place, order=order)
        if source is None and table and name in {"__getitem__", "index_select"}:
            index = args[1] if name == "__getitem__" else named(args, kwargs, 2, "index")
            looked_up = self.of(index)
            if looked_up is not None and not looked_up.axis and result.shape[:1] == (looked_up.rows,):
                return self._owned([(result, looked_up)])
        if source is not None:
            found = through_packing(name, args, kwargs, result, source)
            if found is None and name in TAKES:
                found = taken(name, args, kwargs, source, result)
            if found is not None:
                known = self._owned(found, taken_out=True)
                if order is not None and name in _CUTS and next(tensors_among(args[1:]), None) is None:
                    self._forget_in_place(t for t, _ in found)
                return known
        if starts:
            return False
        if any((mine := self.of(t)) is not None and mine.axis for t in tensors_among((*args, *kwargs.values()))):
            found = kept_behind(name, args, kwargs, result, self.of)
        else:
            found = kept(name, args, kwargs, result, self.of)
        return self._owned(viewed(name, args, kwargs, result, source) if found is None else found)

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

    def _in_order(self, rows: int, device: torch.device, *, axis: int = 0, order: Turned | None = None) -> Routed:
        key = (rows, device, axis, order)
        if key not in self._by_place:
            first = self._batch_first
            usual = Routed.in_order(rows, self._examples, device=device, batch_first=first, axis=axis)
            self._by_place[key] = usual if order is None else Routed(order.owner(self._examples, device))
        return self._by_place[key]

    def _forget_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Forgets the owners of pieces in which every example has its place, such as the first of two views."""
        for t in tensors:
            mine = self.of(t)
            if mine is not None and mine.same(self._in_order(mine.rows, t.device)):
                self.forget(t)

    def _number(self, t: object) -> Routed | None:
        """Returns the rows that the entries of a tensor are numbers of, if that is known."""
        found = self._numbers.get(id(t))
        return found[1] if found is not None and found[0]() is t else None

    def _owned(self, found: list[tuple[Tensor, Routed]] | None, *, taken_out: bool = False) -> bool:
        """Takes note of owners; of none where rows lie in their places, or were taken out of them and are all back."""
        if found is None:
            return False
        for t, routed in found:
            if routed.by_place or (taken_out and self._is_back(routed)):
                self.forget(t)
            else:
                self.put(t, routed)
        return True

    def _is_back(self, routed: Routed) -> bool:
        """Returns whether rows that were taken from others in their turn lie where rows of a batch do."""
        source = routed.origin
        if source is None or source.origin is None or not source.first_origin.by_place or routed.rows != source.rows:
            return False
        return torch.equal(routed.owner, self._in_order(routed.rows, routed.owner.device).owner)

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
            self.put(written, mine)  # constants, or what other checks look at: rows keep their places
            return True
        index = index_of_rows(name, args, kwargs, container, theirs.rows)
        if index is None or theirs.axis or (mine is not None and mine.axis):
            return False
        if mine is not None:
            known = mine if theirs.same(mine.taken(index)) else None
        else:
            numbered = self._number(named(args, kwargs, 2, "index") if name in ADDS else args[1])
            known = self._destination(container.shape[0], index, theirs, numbered)
        if known is None:
            return False
        if known.by_place:
            self.forget(written)
        else:
            self.put(written, known)
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
