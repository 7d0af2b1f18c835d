"""Rows whose examples are known although they were moved: what is followed from a sort, or a packing, to a parameter.

`pack_padded_sequence` sorts the batch by length, and puts its elements in the order of time: row i of the packed data
belongs to the example that the sort put there. So the owners of packed rows follow from the indices of the sort and
the sizes of the steps, and nothing has to be guessed. Here both are seen as torch's functions are called:

    x[order], x.index_select(0, order)      entry i belongs to example order[i]
    _pack_padded_sequence                   rows by time; sorted place k at step t belongs to order[k]
    lstm, gru, rnn_tanh, rnn_relu           packed data stay packed; last states lie in the order of the sort
    _pad_packed_sequence, x[order^-1]       back in the order of the batch: nothing is owned any more
    linear, relu, +, ...                    each row stays in its place

A function that moves owned rows in any other way makes a result whose examples are not known.

Axes: B examples, R rows, T steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from privet.errors import UnsupportedModelError
from privet.gradients.capture.call import tensors_among
from privet.gradients.capture.moves import Move
from privet.gradients.capture.routing import Routed
from privet.gradients.layout import DoubtError
from privet.gradients.rules.arguments import named
from privet.gradients.tracing import tracing

__all__ = ["RECURRENT", "Owned", "PackedRows", "packed"]

RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_TAKES = frozenset({"index_select", "__getitem__"})
_VIEWS = frozenset({"__getitem__", "squeeze", "transpose"})
_STARTS = _TAKES | {"_pack_padded_sequence"}
HoldsBatch = Callable[[Tensor, int], bool]
"""Says whether an axis of a tensor that nobody has moved holds the examples of the batch, in their order."""


class Owned(Routed):
    """Which example each entry on one axis belongs to.

    Args:
        owner: (R,) places in the batch.
        axis: the axis of these entries.
        order: the example at each sorted place, of packed rows.
        sizes: how many of the sorted sequences each step has, of packed rows.
    """

    def __init__(
        self, owner: Tensor, axis: int = 0, *, order: Tensor | None = None, sizes: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(owner)
        self.axis = axis
        self.order = order
        self.sizes = sizes

    def same_as(self, other: Routed) -> bool:
        """Returns whether entry i of both belongs to the same example, on the same axis."""
        if self is other or not isinstance(other, Owned):
            return self is other
        return (self.axis, self.sizes) == (other.axis, other.sizes) and torch.equal(self.owner, other.owner)

    @cached_property
    def _ranks(self) -> tuple[Tensor, int]:
        """Returns which of its example's rows each row is, and L: in packed rows, the step."""
        if self.sizes is None:
            return super()._ranks
        steps = torch.tensor(self.sizes, device=self.owner.device)
        return torch.arange(len(steps), device=self.owner.device).repeat_interleave(steps), len(steps)


def packed(order: Tensor, sizes: tuple[int, ...]) -> Owned:
    """Returns the owners of rows by time, of which step t has the first `sizes[t]` in order."""
    steps = torch.tensor(sizes, device=order.device)
    places = torch.arange(len(order), device=order.device)
    return Owned(order.expand(len(sizes), -1)[places < steps.unsqueeze(1)], order=order, sizes=sizes)


class PackedRows:
    """The tensors of one forward whose owners are known."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Owned]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def clear(self) -> None:
        """Forgets the forward."""
        self._found.clear()

    def of(self, value: object) -> Owned | None:
        """Returns the owners of a tensor's entries, or None if they were not moved, or nobody knows."""
        found = self._found.get(id(value))
        return found[1] if found is not None and found[0]() is value else None

    def put(self, t: Tensor, owned: Owned) -> None:
        """Remembers the owners of a tensor's entries."""
        self._found[id(t)] = (weakref.ref(t), owned)

    def forget(self, t: Tensor) -> None:
        """Takes note that nobody knows the owners of a tensor's entries any more."""
        self._found.pop(id(t), None)

    def concerns(self, name: str, tensors: Sequence[Tensor]) -> bool:
        """Returns whether a call may begin, or go on with, rows whose owners are known."""
        return name in _STARTS or (bool(self._found) and any(self.of(t) is not None for t in tensors))

    def follow(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        move: Move | None,
        *,
        examples: int,
        holds: HoldsBatch,
        doubtful: bool,
    ) -> bool | None:
        """Takes note of whose the rows of a result are, and returns whether that is known.

        Args:
            name: of the function.
            args: what it was called with.
            kwargs: what it was called with by name.
            result: what it returned.
            move: along which axes it moves entries, or None if it moves none.
            examples: B.
            holds: of the call's first argument, see `HoldsBatch`.
            doubtful: whether rows of an argument were moved so that nobody knows whose they are.

        Returns:
            True if the rows of the result are known; False if they were, and are not any more; None if none were.
        """
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and name in _TAKES:
            axis, index = _taken_by(name, args, kwargs)
            owner = None if index is None else self._owners(source, axis, examples, holds)
            if index is not None and owner is not None:
                self._place(result, owner[index.to(owner.device)], axis, examples)
                return True
            move = Move((), 0, axes=(axis,)) if index is not None else move
        if source is not None and name in _VIEWS and (owned := self.of(source)) is not None:
            return self._view(owned, _axis_after(name, owned.axis, args, kwargs, result), result)
        if source is not None and name == "_pack_padded_sequence":
            if tracing():
                raise UnsupportedModelError(
                    "the model packs sequences, whose shapes depend on their lengths, which a graph cannot have. "
                    "Expected compile=False. Or pad the sequences, and mask the outputs."
                )
            a = named(args, kwargs, input=None, lengths=None, batch_first=False)
            return None if a is None else self._pack(source, 0 if a.batch_first else 1, result, examples, holds)
        if source is not None and name == "_pad_packed_sequence":
            return self._pad(source, args, kwargs, result, examples)
        if source is not None and name in RECURRENT and isinstance(args[1], Tensor) and not doubtful:
            return self._recur(source, args[1], result, examples)
        return self._stay(args, kwargs, result, move, doubtful=doubtful)

    def _view(self, owned: Owned, axis: int | None, result: Any) -> bool:
        """Takes note of a result in which the owned entries lie on another axis, if it is known which."""
        if axis is None:
            return False
        self.put(result, owned if axis == owned.axis else Owned(owned.owner, axis))
        return True

    # -- what each function does ---------------------------------------------------------------------------------------

    def _owners(self, source: Tensor, axis: int, examples: int, holds: HoldsBatch) -> Tensor | None:  # (R,)
        """Returns the example of each entry on an axis, or None if it is not known."""
        owned = self.of(source)
        if owned is not None:
            return owned.owner if owned.axis == axis else None
        if tracing() or source.dim() <= axis or source.shape[axis] != examples or not holds(source, axis):
            return None
        return torch.arange(examples, device=source.device)

    def _place(self, result: Tensor, owner: Tensor, axis: int, examples: int) -> None:
        """Remembers the owners of a result, unless its entries are those of the batch in their order."""
        if not _in_order(owner, examples):
            self.put(result, Owned(owner, axis))

    def _pack(self, source: Tensor, axis: int, result: Any, examples: int, holds: HoldsBatch) -> bool | None:
        order = self._owners(source, axis, examples, holds)
        if order is None:
            return None if self.of(source) is None else False
        self.put(result[0], packed(order, tuple(result[1].tolist())))
        return True

    def _pad(
        self, source: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, examples: int
    ) -> bool | None:
        owned = self.of(source)
        if owned is None:
            return None
        a = named(args, kwargs, input=None, batch_sizes=None, batch_first=False, padding_value=0.0, total_length=None)
        if a is None or owned.order is None or owned.sizes != tuple(a.batch_sizes.tolist()):
            return False
        self._place(result[0], owned.order, 0 if a.batch_first else 1, examples)
        self._place(result[1], owned.order, 0, examples)
        return True

    def _recur(self, source: Tensor, sizes: Tensor, result: Any, examples: int) -> bool | None:
        owned = self.of(source)
        if owned is None:
            return None
        if owned.order is None or owned.sizes != tuple(sizes.tolist()):
            return False
        self.put(result[0], owned)
        for last in result[1:]:
            self._place(last, owned.order, 1, examples)
        return True

    def _stay(
        self, args: Any, kwargs: Mapping[str, Any], result: Any, move: Move | None, *, doubtful: bool = False
    ) -> bool | None:
        """Takes note of a result whose rows lie as those of the arguments, if they do."""
        arguments = list(tensors_among((*args, *kwargs.values())))
        found = [owned for t in arguments if (owned := self.of(t)) is not None]
        if not found:
            return None
        owned = found[0]
        results = list(tensors_among(result if isinstance(result, tuple | list) else (result,)))
        # A product takes rows of its second argument; what is joined may begin with rows of anything.
        second = move is not None and move.static is None and self.of(arguments[0]) is None
        moved = move is not None and (move.axes is None or owned.axis in move.axes or second)
        lies = [t.dim() > owned.axis and t.shape[owned.axis] == owned.rows for t in results]
        if owned.axis:  # a transposition is not seen to move anything
            lies = [lie and t.shape == arguments[0].shape for lie, t in zip(lies, results, strict=True)]
        if move is None and not results:  # a question, such as for the shape
            return None
        if doubtful or moved or not all(lies) or not all(owned.same_as(other) for other in found[1:]):
            return False
        for t in results:
            self.put(t, owned)
        return True

    # -- what a recurrent layer asks -----------------------------------------------------------------------------------

    def require_alike(
        self, name: str, data: Tensor, sizes: Tensor | None, firsts: Sequence[Tensor], examples: int
    ) -> None:
        """Raises unless it is known whose the rows of a recurrent layer's data are, and its first states lie alike.

        Args:
            name: of the function.
            data: (R..., F).
            sizes: of the steps of packed data, else None.
            firsts: (layers, B, H) each.
            examples: B.

        Raises:
            UnsupportedModelError: if data are packed, and it is not known whose the rows are.
            DoubtError: if they were moved since they were packed, or the first states lie in another order.
        """
        owned = self.of(data)
        if sizes is not None and owned is None:
            raise UnsupportedModelError(
                f"{name} met a packed sequence, and nothing tells whose its rows are. Expected one that is packed "
                "inside of the model, by pack_padded_sequence, from a padded tensor that has the batch of the model's "
                "inputs on an axis. Let the data loader yield padded sequences and a tensor of their lengths, and "
                "pack in the forward."
            )
        if sizes is not None and owned is not None and owned.sizes != tuple(sizes.tolist()):
            raise DoubtError(
                f"{name} met rows of a packed sequence with the batch_sizes of another one, or in another order",
                "Pass data and batch_sizes of one packed sequence.",
            )
        order = None if owned is None else owned.owner if owned.order is None else owned.order
        for first in firsts:
            held = self.of(first)
            if (held is None and order is None) or not (first.requires_grad or bool(first.any())):
                continue
            orders = (order, None if held is None else held.owner)
            here, there = (torch.arange(examples) if o is None else o for o in orders)
            if not torch.equal(here.cpu(), there.cpu()):
                raise DoubtError(
                    f"{name} met first states in another order than its data",
                    "Keep sorted_indices in a PackedSequence, so that torch sorts the first states too.",
                )


def _in_order(owner: Tensor, examples: int) -> bool:
    return len(owner) == examples and torch.equal(owner, torch.arange(examples, device=owner.device))


def _taken_by(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, Tensor | None]:
    """Returns the axis along which a call takes entries by one list of places, and the list, or None."""
    if name == "index_select":
        a = named(args, kwargs, input=None, dim=0, index=None)
        return (0, None) if a is None else (a.dim % max(a.input.dim(), 1), a.index)
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    lists = [place for place, item in enumerate(items) if not _is_whole(item)]
    item = items[lists[0]] if len(lists) == 1 else None
    if isinstance(item, Tensor) and item.dim() == 1 and item.dtype == torch.int64 and Ellipsis not in items[: lists[0]]:
        return lists[0], item
    return 0, None


def _is_whole(item: Any) -> bool:
    return item is Ellipsis or (isinstance(item, slice) and item == slice(None))


def _axis_after(name: str, axis: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """Returns the axis of a view on which entries lie that were on `axis`, or None if not all of them do."""
    t = args[0]
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
            return new if _is_whole(item) else None
        elif isinstance(item, int | slice) and not isinstance(item, bool):
            old, new = old + 1, new + isinstance(item, slice)
        else:
            return None  # indices by tensors change the order of the axes
    return new + axis - old
