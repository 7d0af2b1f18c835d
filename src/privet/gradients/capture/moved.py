"""Rows that were moved along the batch: seen as it happens, and followed until they meet a parameter.

While a private forward runs, every function of torch is looked at. Most of them leave each row in its place. One that
moves entries (`moves.py`) is harmless if it moves them along an axis that holds no examples, such as the positions or
the features. While a batch is checked the model runs with B and with B + 1 examples, and the axes that grow are
remembered for each place in the code. What moves entries along one of those, or at a place that no check has seen,
makes a result whose rows have no certain example: it is *tagged*, and so is what is computed of it. A tagged tensor
that meets a parameter puts the forward in doubt.

    x[:, 0], x.chunk(3, dim=-1), cat([token, x], dim=1)     along other axes: harmless
    x[arange(B), length - 1]                                every row stays with its example: harmless
    x[mask], x[order], x.unbind(0), cat(list(x))            tagged
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
from dataclasses import dataclass, field
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

from privet.gradients.capture.call import tensors_among
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.eager import set_stance
from privet.gradients.capture.moves import Move, masks_among, move_of, mover_of
from privet.gradients.capture.routing import routed_now
from privet.gradients.layout import DoubtError
from privet.gradients.tracing import tracing

__all__ = ["KnownMoves", "MovedRows", "MovesMet", "codes_of"]

_UNSEEN: Any = object()
_PADS = nn.utils.rnn.pad_packed_sequence.__code__
"""Puts the steps of a packed sequence back by example, in the order of the examples."""
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTED = tuple(
    f"{_TORCH}/{p}" for p in ("distributed/tensor/", "distributed/_functional_collectives.py", "_utils.py")
)


class MovesMet:
    """The moves of one forward of a check, in order, each with its place in the code.

    Dropout draws more random numbers for more examples, and what is drawn after it (is this layer skipped?) would be
    another number. So a forward may follow another one: after each draw it goes on with that one's random numbers.

    Args:
        follows: the moves of a forward that is over.
    """

    def __init__(self, follows: MovesMet | None = None) -> None:
        self.moves: list[tuple[Hashable, Move]] = []
        self._follows = follows
        self.states = [torch.get_rng_state()]

    def drawn(self) -> None:
        """Takes note of what a function has drawn, if it has; called after each."""
        state = torch.get_rng_state()
        if torch.equal(state, self.states[-1]):
            return
        if self._follows is not None and len(self.states) < len(self._follows.states):
            state = self._follows.states[len(self.states)]
            torch.set_rng_state(state)
        self.states.append(state)


@dataclass
class _Known:
    """What was seen of one move at one place in the code."""

    grew: bool = False  # whether an axis along which it moves grows with the batch
    axes: set[int] = field(default_factory=set)  # which of its sizes grow
    static: set[Hashable] = field(default_factory=set)  # the moves that are the same on every batch


@dataclass
class KnownMoves:
    """What the checks have seen of all moves."""

    known: dict[Hashable, _Known] = field(default_factory=dict)

    def copy(self) -> KnownMoves:
        """Returns the same knowledge, which what is learned later does not change."""
        return KnownMoves({key: _Known(k.grew, set(k.axes), set(k.static)) for key, k in self.known.items()})

    def learn(self, first: MovesMet, second: MovesMet) -> None:
        """Learns from the moves of the same model with B and with B + 1 examples."""
        pairs: dict[Hashable, tuple[list[Move], list[Move]]] = {}
        for which, met in enumerate((first, second)):
            for key, move in met.moves:
                pairs.setdefault(key, ([], []))[which].append(move)
        for key, (small, large) in pairs.items():
            known = self.known.setdefault(key, _Known())
            if len(small) != len(large):  # as often as there are examples, say
                known.grew, known.axes = True, set(range(len((small or large)[0].sizes)))
            for one, two in zip(small, large, strict=False):
                axes = {i for i, (n, m) in enumerate(zip(one.sizes, two.sizes, strict=False)) if n != m}
                known.axes |= axes
                known.grew = known.grew or bool(axes) or len(one.sizes) != len(two.sizes)
                if one.static is not None and one.static == two.static:
                    known.static.add(one.static)

    def harmless(self, key: Hashable, move: Move) -> bool:
        """Returns whether the move leaves every row of the batch in its place, or is the same on every batch."""
        known = self.known.get(key)
        if known is None:
            return False
        if not known.grew or (move.static is not None and move.static in known.static):
            return True
        return bool(known.axes) and all(i < len(move.by) and _in_place(move.by[i], move.sizes[i]) for i in known.axes)


def _in_place(index: Tensor | None, size: int) -> bool:
    """Returns whether indices are 0, 1, ..., size - 1, so that nothing moves."""
    if index is None or index.numel() != size or tracing():
        return False
    flat = index.detach().reshape(-1)
    return torch.equal(flat, torch.arange(size, dtype=flat.dtype, device=flat.device))


class MovedRows(TorchFunctionMode):
    """Follows the rows of one forward at a time.

    Args:
        is_root: whether a value is a parameter that is watched.
        within: the code of the functions that a forward begins with: a place is told by the calls inside of them.
        in_parts: whether each process holds parts of tensors, which torch brings together.
    """

    def __init__(
        self, is_root: Callable[[object], bool], within: Iterable[CodeType] = (), *, in_parts: bool = False
    ) -> None:
        super().__init__()
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

    def start(self, cycle: Cycle, met: MovesMet | None) -> None:
        """Follows the rows of a forward that begins now in this thread; only lists its moves, if there is a list."""
        self.stop()
        self._cycle, self._met = cycle, met
        self._follows = met is not None
        self._stance = set_stance()
        # Whose the rows are was found out for this very batch, or they are nobody's.
        if met is None and (cycle.telling or not cycle.examples):
            return
        self._thread = threading.get_ident()
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
        self._cycle = self._met = None
        self._follows = False
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
        move = None
        if mover is not None and not any(map(self._is_root, args[:3])) and not self._is_known(_caller().f_code):
            move = move_of(mover, args, kwargs)
        if self._met is not None:
            if move is not None:
                self._met.moves.append((self._key(func, move, _caller(), keep=True), move))
            result = func(*args, **kwargs)
            self._met.drawn()
            return result
        tensors = list(tensors_among((*args, *kwargs.values()))) if self._tags else []
        masks = masks_among(func, args) if self._tags and self._is_root(args[-1]) else ()
        tag = next((self._tags[id(t)][1] for t in tensors if self._tagged(t) and not any(t is m for m in masks)), None)
        if tag is not None and routed_now() is None and any(map(self._is_root, tensors)):
            cycle.doubt = _doubt(func, tag)
            return func(*args, **kwargs)
        moved = move is not None and not self.known.harmless(self._key(func, move, _caller()), move)
        result = func(*args, **kwargs)
        if tag is None and not moved:
            return result
        place = tag or _place(func, _caller())
        if move is not None and move.into is not None:
            container = args[0] if args else result
            if not (move.into in self._sources or (tag is None and move.into == move.sizes[: len(move.into)])):
                self._tag((container, result, getattr(container, "_base", None)), place)
            return result
        if move is not None and moved:
            self._sources.add(move.sizes)
        self._tag((result,), place)
        if tag is not None and args and result is args[0]:
            self._tag(getattr(result, "_base", None), place)
        return result

    def doubt_of_all(self, func: Callable[..., Any]) -> DoubtError | None:
        """Returns a doubt of any operation on a parameter, if some rows of this forward have been moved."""
        moved = next((place for ref, place in self._tags.values() if ref() is not None), None)
        return None if moved is None or routed_now() is not None else _doubt(func, moved)

    def _tagged(self, t: Tensor) -> bool:
        found = self._tags.get(id(t))
        return found is not None and found[0]() is t

    def _tag(self, values: Any, place: str) -> None:
        for t in tensors_among(values if isinstance(values, tuple) else (values,)):
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
