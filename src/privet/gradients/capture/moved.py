"""Rows that were moved along the batch: seen as it happens, and followed until they meet a parameter.

While a private forward runs, every function of torch is looked at. Most of them leave each row in its place. One that
moves entries (`moves.py`) is harmless if it moves them along an axis that holds no examples, such as the positions or
the features. While a batch is checked the model runs with B and with B + 1 examples, and the axes that grow are
remembered for each place in the code. What moves entries along one of those, or at a place that no check has seen,
makes a result whose rows have no certain example: it is *tagged*, and so is what is computed of it. A tagged tensor
that meets a parameter puts the forward in doubt.

    x[:, 0], x.chunk(3, dim=-1), cat([token, x], dim=1)     along other axes: harmless
    x[arange(B), length - 1]                                every row stays with its example: harmless
    x[mask], x[order], pack_padded_sequence(x)              rows with owners of their own (`owned.py`)
    x.unbind(0), cat(list(x)), x.unfold(0, 2, 1)            tagged
    out[mask] = tagged                                      back where rows were taken: `out` is not tagged
    out[tagged_mask] = parameter                            every row of `out` stays in its place

Parts that are compiled by torch.compile run eagerly meanwhile, for nobody sees the rows that move inside of them.

Where nothing was tagged, this costs one look into a dictionary for each function, and a little more for those that
move.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._device import DeviceContext

from privet.batches.graphs import RowsTold
from privet.errors import PrivetError
from privet.gradients.capture.call import tensors_among
from privet.gradients.capture.checkpoints import not_reentrant
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.eager import set_stance
from privet.gradients.capture.kept import ALIKE, base_name
from privet.gradients.capture.known_moves import KnownMoves, MovesMet
from privet.gradients.capture.moves import Move, masks_among, move_of, mover_of
from privet.gradients.capture.owned import OwnedRows
from privet.gradients.capture.routing import routed_now
from privet.gradients.layout import DoubtError
from privet.gradients.tracing import tracing

__all__ = ["MovedRows", "codes_of"]

_UNSEEN: Any = object()
_BY_OFFSETS = frozenset({"_grouped_mm", "grouped_mm", "grouped_mm_fallback"})
"""Functions whose other arguments say where rows are cut, and have no rows themselves."""
_PADS = nn.utils.rnn.pad_packed_sequence.__code__
"""Puts the steps of a packed sequence back by example, in the order of the examples."""
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTED = tuple(
    f"{_TORCH}/{p}" for p in ("distributed/tensor/", "distributed/_functional_collectives.py", "_utils.py")
)


class MovedRows(TorchFunctionMode):
    """Follows the rows of one forward at a time.

    Args:
        is_root: whether a value is a parameter that is watched.
        within: the code of the functions that a forward begins with: a place is told by the calls inside of them.
        in_parts: whether each process holds parts of tensors, which torch brings together.
        batch_first: whether axes merged with the batch have the batch outside.
    """

    def __init__(
        self,
        is_root: Callable[[object], bool],
        within: Iterable[CodeType] = (),
        *,
        in_parts: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.owned = OwnedRows(batch_first=batch_first)
        self._in_parts = in_parts
        self.known = KnownMoves()
        self._is_root = is_root
        self._within = frozenset(within)
        self._movers: dict[Any, Any] = {}
        self._places: dict[int, CodeType] = {}  # codes that known places are made of: their ids stay theirs
        self._cycle: Cycle | None = None
        self._met: MovesMet | None = None
        self._thread = 0
        self._stance: Any = None  # of torch.compile, to be put back
        self._follows = False  # whether all functions count: there are tags, or a check lists what is met
        self._tags: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._sources: set[tuple[int, ...]] = set()  # the sizes along which rows were taken

    @property
    def thread(self) -> int:
        """Returns the number of the thread whose functions are looked at."""
        return self._thread

    # -- when it looks -----------------------------------------------------------------------------------------------

    def start(self, cycle: Cycle, met: MovesMet | None, told: Iterable[RowsTold] = ()) -> None:
        """Follows the rows of a forward that begins now in this thread; only lists its moves, if there is a list.

        Args:
            cycle: of the forward.
            met: the list.
            told: whose rows tensors have, as the inputs tell.
        """
        self.stop()
        self._cycle, self._met = cycle, met
        self._stance = set_stance()
        if not cycle.examples:
            return
        if not tracing():
            self.owned.begin(cycle.examples, told)
        self._follows = met is not None or bool(self.owned)
        self._thread = threading.get_ident()
        not_reentrant(self, self._thread)
        # At the bottom: if the forward is interrupted, a user's own mode around it still takes itself off.
        if not torch._C._len_torch_function_stack():  # noqa: SLF001 - torch's own modes ask it
            _push_mode(self)  # type: ignore[no-untyped-call]
            return
        modes = [mode for mode in _taken_off() if mode is not self]
        lowest = sum(isinstance(mode, DeviceContext) for mode in modes[:1])  # which insists on being the lowest
        _put_on([*modes[:lowest], self, *modes[lowest:]])

    def stop(self) -> None:
        """Forgets the forward, and looks at nothing any more."""
        if self._cycle is None and not self._thread:
            return
        not_reentrant(self, 0)
        self._cycle = self._met = None
        self._follows = False
        self.owned.clear()
        stance, self._stance = self._stance, None
        if stance is not None:
            set_stance(stance)
        self._tags.clear()
        self._sources.clear()
        if self._thread == threading.get_ident():  # else it stays on that thread's stack, and does nothing there
            self._thread = 0
            _put_on([mode for mode in _taken_off() if mode is not self])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        mover = self._movers.get(func, _UNSEEN)
        # What most functions are: none that moves anything, or a product with a parameter, which captures it itself.
        if not self._follows and (mover is None or (len(args) > 1 and self._is_root(args[1]))):
            return func(*args, **kwargs) if kwargs else func(*args)
        if mover is _UNSEEN:
            mover = self._movers[func] = mover_of(func)
        cycle = self._cycle
        if cycle is None or cycle.doubt is not None:
            return func(*args, **(kwargs or {}))
        return self._followed(cycle, mover, func, args, kwargs or {})

    # -- one function ------------------------------------------------------------------------------------------------

    def _followed(
        self, cycle: Cycle, mover: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        frame = _caller()
        move = key = None
        if mover is not None and not any(map(self._is_root, args[:3])) and not self._is_known(frame.f_code):
            move = move_of(mover, args, kwargs)
            key = None if move is None else self._key(func, move, frame, keep=self._met is not None)
        follows = self._tags or self.owned
        tensors = list(tensors_among((*args, *kwargs.values()))) if follows else []
        if frame.f_code is _PADS:  # whose the rows are is a matter of what is put back, and not of the indices
            tensors = tensors[:1]
        owned = self.owned.among(tensors)
        masks = masks_among(func, args) if self._tags and args and self._is_root(args[-1]) else ()
        tag = next((self._tags[id(t)][1] for t in tensors if self._tagged(t) and not any(t is m for m in masks)), None)
        if tag is not None and routed_now() is None and self._meets(func, tensors):
            cycle.doubt = _doubt(func, tag)
            return func(*args, **kwargs)
        moved = move is not None and not self.known.harmless(key, move)
        # An index of a sort is followed, too, in a batch that happens to be sorted.
        takes = move is not None and (moved or owned)
        by_place = self._by_place(key, move, func, args, kwargs) if takes and move is not None else None
        if self._met is not None:
            self._met.saw(func, args, kwargs)
            if move is not None:
                self._met.moves.append((key, move))
            if by_place is not None:
                self._met.guessed.add(key)
        result = func(*args, **kwargs)
        if self._met is not None:
            self._met.drawn()
        self.owned.follow_numbers(func, args, result)
        if move is not None and moved and move.into is None:
            self._sources.add(move.sizes)
        if owned or by_place is not None:
            table = self._is_table(args, move is not None and not moved)
            order = self.known.order(key) if by_place == 0 else None
            if self._owns(func, args, kwargs, result, by_place=by_place, table=table, order=order):
                return result
            self.owned.forget_written(tensors_among((result,)), tensors)
        # What this batch is told, or what is only listed, leaves no doubt.
        if self._met is None and not cycle.telling and (owned or tag is not None or moved):
            self._tag_result(args, move, result, tag or _place(func, frame), tagged=owned or tag is not None)
        return result

    def _meets(self, func: Callable[..., Any], tensors: Sequence[Tensor]) -> bool:
        """Returns whether a parameter meets rows of which nobody knows the owners; one of the tensors is tagged."""
        by_offsets = getattr(func, "__name__", "") in _BY_OFFSETS
        return any(map(self._is_root, tensors)) and (not by_offsets or self._tagged(tensors[0]))

    def _is_table(self, args: tuple[Any, ...], unmoved: bool) -> bool:  # noqa: FBT001 - what was just found
        """Returns whether the rows of the first argument are nobody's: a parameter's, or a constant's."""
        t = args[0] if args else None
        return self._is_root(t) or (unmoved and isinstance(t, Tensor) and not t.requires_grad)

    def _by_place(
        self, key: Hashable, move: Move, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int | None:
        """Returns the axis along which a function takes rows that lie by place, or None if it is not known of any.

        A check has seen it of this place in the code; while it looks, it is a guess.
        """
        if routed_now() is not None:
            return None
        axis = self.owned.takes_along(func, args, kwargs, move)
        if axis is None or tracing() or self.owned.of(args[0]) is not None or self._tagged(args[0]):
            return None
        order = self.known.order(key) if axis == 0 else None
        if order is not None and self._cycle is not None and not order.fits(len(args[0]), self._cycle.examples):
            return None
        lies = self.known.lies(key, move, axis)
        return axis if lies or (lies is None and self._met is not None) else None

    def _owns(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, **how: Any
    ) -> bool:
        """Returns whether the owners of the rows of a result are known, and takes note of them."""
        tagged = [t for t in tensors_among((*args, *kwargs.values())) if self._tagged(t) and t.is_floating_point()]
        # A factor whose rows are not certain leaves every row of the other its owner, or examples meet.
        if tagged and (base_name(func) not in ALIKE or any(t is result for t in tagged)):
            return False
        try:
            known = self.owned.follow(func, args, kwargs, result, **how)
        except PrivetError:
            raise
        except Exception:  # noqa: BLE001 - arguments in a form that is not understood: nobody knows the owners
            return False
        if known:
            self._follows = True
            for t in tensors_among((result,)):
                base = getattr(t, "_base", None)
                if args and t is args[0] and base is not None and not self.owned.among((base,)):
                    self._tag(base, _place(func, _caller()))  # written through a view of it
        return known

    def _tag_result(self, args: tuple[Any, ...], move: Move | None, result: Any, place: str, *, tagged: bool) -> None:
        """Tags what a function returned, or wrote to: nobody knows whose the rows are."""
        if move is not None and move.into is not None:
            container = args[0] if args else result
            if not (move.into in self._sources or (not tagged and move.into == move.sizes[: len(move.into)])):
                self._tag((container, result, getattr(container, "_base", None)), place)
            return
        self._tag((result,), place)
        if args and result is args[0]:
            self._tag(getattr(result, "_base", None), place)

    def doubt_of_all(self, func: Callable[..., Any]) -> DoubtError | None:
        """Returns a doubt of any operation on a parameter, if some rows of this forward have been moved."""
        moved = next((place for ref, place in self._tags.values() if ref() is not None), None)
        if moved is None and self.owned:
            moved = "an index, a sort or a packing"
        return None if moved is None or routed_now() is not None else _doubt(func, moved)

    def _tagged(self, t: Tensor) -> bool:
        found = self._tags.get(id(t))
        return found is not None and found[0]() is t

    def _tag(self, values: Any, place: str) -> None:
        for t in tensors_among(values if isinstance(values, tuple) else (values,)):
            self.owned.forget(t)
            self._tags[id(t)] = (weakref.ref(t), place)
            self._follows = True

    def _is_known(self, code: CodeType) -> bool:
        """Returns whether it is known of the caller of a function that it leaves every example its place."""
        # Parts that are brought together, or cut, over ranks that see the same examples. Where ranks see parts of the
        # batch, operations on parameters refuse it.
        return code is _PADS or (self._in_parts and code.co_filename.startswith(_DISTRIBUTED))

    # -- places ------------------------------------------------------------------------------------------------------

    def _key(self, func: Callable[..., Any], move: Move, frame: FrameType | None, *, keep: bool = False) -> Hashable:
        """Returns a name for a move: what it is, and by which calls inside of the forward it came about."""
        path: list[int] = []
        while frame is not None:
            code = frame.f_code
            # How torch calls a module is not the same while a graph is traced; only the innermost line of it counts.
            if not path or not code.co_filename.startswith(_TORCH):
                path += (id(code), frame.f_lasti)
                if keep:
                    self._places[id(code)] = code
            if code in self._within:
                break
            frame = frame.f_back
        else:
            path = path[:2]  # what calls the forward is not the same in a check
        return getattr(func, "__name__", ""), move.kind, tuple(path)


def _caller() -> FrameType:
    """Returns the frame that called the function of torch which the mode looks at."""
    frame: FrameType = sys._getframe(3)  # noqa: SLF001 - below `_followed` and `__torch_function__`
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:  # of another mode
        frame = frame.f_back
    return frame


def codes_of(function: Callable[..., Any] | None) -> set[CodeType]:
    """Returns the code of a function, and of what it wraps."""
    found = set()
    while function is not None:
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None:
            found.add(code)
        function = getattr(function, "__wrapped__", None)
    return found


def _taken_off() -> list[Any]:
    """Returns the modes of this thread, the lowest first, and takes them off."""
    return [_pop_mode() for _ in _get_current_function_mode_stack()][::-1]  # type: ignore[no-untyped-call]


def _put_on(modes: Sequence[Any]) -> None:
    for mode in modes:
        _push_mode(mode)  # type: ignore[no-untyped-call]


def _place(func: Callable[..., Any], frame: FrameType | None) -> str:
    """Returns a function and the line of the user's code that called it."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    name = getattr(func, "__name__", str(func))
    return name if frame is None else f"{name} in {frame.f_code.co_filename}, line {frame.f_lineno}"


def _doubt(func: Callable[..., Any], place: str) -> DoubtError:
    return DoubtError(
        f"{getattr(func, '__name__', func)} with a parameter met rows that had been moved along the batch by {place}",
        "Say whose the rows are (privet.rows_of), or leave every row of the batch in its place.",
        place=place,
    )
