"""In which order rows lie that are not example by example: found out by what the examples do, when a check has failed.

The model runs several times on the batch at hand. Each time the gradients at its outputs are those of some examples
alone: the rows of an operation that a gradient reaches are rows of these. Where rows are taken along the batch, the
rows that change when examples are replaced tell the same. An order is believed if no row speaks against it, in all
runs, and the check is made again with it.

    z = encoder(cat([a, b]))        two views of each example: rows 0 ... B - 1, and again
    first, second = z.chunk(2)      each of them in its place

Axes: B examples, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from privet.batches.kept import opened
from privet.batches.replace import nearest, rearranged
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.known_moves import MovesMet
from privet.gradients.capture.output_gradients import differentiable, weighted
from privet.gradients.capture.rows_seen import RowsSeen
from privet.gradients.derived import Derivation
from privet.gradients.layout import Layout
from privet.gradients.turned import Turned, by_row, orders
from privet.gradients.use import Use

__all__ = ["learn_orders"]

Seen = list[tuple[Tensor, Tensor]]
"""Which examples took part, (B,) truth values, and which rows were reached by them, (R,)."""


def learn_orders(
    capture: Capture,
    run: Callable[[Any], Sequence[Tensor]],
    inputs: Any,
    *,
    examples: int,
    batch_axis: int,
    restore: Callable[[], None],
) -> Callable[[], None] | None:
    """Returns what teaches the capture the orders that were found, or None if there are none.

    Args:
        capture: is not in use. It learns nothing before what is returned is called.
        run: returns the model's differentiable outputs for some inputs.
        inputs: B examples.
        examples: B.
        batch_axis: the axis of the inputs that the examples are on.
        restore: called before each run, to put buffers and random numbers back.
    """
    if examples == 1:  # two examples that are not alike, to tell which rows are whose
        inputs, examples = rearranged(inputs, [0, 0], examples=1, axis=batch_axis, factors=[1.0, 0.5]), 2
    groups = _groups(examples)
    usual = capture.batch_first
    at_sites: dict[Any, Seen] = {}
    at_moves: dict[Hashable, Seen] = {}
    restore()
    before = _forward(capture, run, inputs, examples)
    for group in groups:
        restore()
        for key, reached in _reached(capture, run, inputs, group, batch_axis):
            at_sites.setdefault(key, []).append((group, reached))
        if not before.lengths:
            continue
        others = rearranged(inputs, nearest((~group).tolist()), examples=examples, axis=batch_axis)
        restore()
        after = _forward(capture, run, others, examples)
        for key, one, two in before.beside(after):
            at_moves.setdefault(key, []).append((~group, one != two))
    sites = {
        key: order
        for key, seen in at_sites.items()
        if (order := _order(seen, examples, batch_first=usual, axis=key[2]))
    }
    moves = {key: order for key, seen in at_moves.items() if (order := _order(seen, examples, batch_first=usual))}
    new = [key for key, order in sites.items() if order not in capture.layouts.known.get(key[0], ())]
    new += [key for key, order in moves.items() if capture.moved.known.order(key) != order]
    if not new:
        return None

    def teach() -> None:
        for (site, _, _), order in sites.items():
            capture.layouts.turn(site, order)
        for key, order in moves.items():
            capture.moved.known.turn(key, order)

    return teach


def _groups(examples: int) -> list[Tensor]:  # of (B,) truth values
    """Returns groups of examples such that any two are apart in one of them: one for each digit, and the others."""
    places = torch.arange(examples)
    digits = [(places >> digit) % 2 == 1 for digit in range((examples - 1).bit_length())]
    return [group for digit in digits for group in (digit, ~digit)]


def _order(seen: Seen, examples: int, *, batch_first: bool, axis: int = 0) -> Turned | None:
    """Returns the order that all rows agree with, or None: if they lie as a rule, or nothing was reached."""
    rows = {len(reached) for _, reached in seen}
    if len(rows) != 1 or not any(bool(reached.any()) for _, reached in seen):
        return None
    (count,) = rows
    each = count // examples
    usual = Turned(1, each) if batch_first else Turned(each, 1)
    if each < 2 or (usual.fits(count, examples) and _agrees(usual, seen, examples)):
        return None
    fits = orders(count, examples, batch_first=batch_first, axis=axis)
    return next((order for order in fits if _agrees(order, seen, examples)), None)


def _agrees(order: Turned, seen: Seen, examples: int) -> bool:
    owner = order.owner(examples)
    return not any(bool((reached.cpu() & ~group[owner]).any()) for group, reached in seen)


class _Ignored:
    """Takes the uses of a backward, and forgets them."""

    def put(self, target: str | Derivation, use: Use) -> None:
        """Forgets a use."""

    def done(self) -> None:
        """Does nothing."""


class _MovesSeen(MovesMet):
    """The moves of one forward, with a number for each row that entries are taken from."""

    def __init__(self) -> None:
        super().__init__()
        self._last: Tensor | None = None
        self.lengths: dict[int, Tensor] = {}  # (R,) by the place of the move

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes note of what a function is called with."""
        super().saw(func, args, kwargs)
        t = args[0] if args else None
        if isinstance(t, Tensor) and t.dim() and not t.is_complex():
            self.lengths[len(self.moves)] = torch.linalg.vector_norm(by_row(t.detach()).double(), dim=1)

    def beside(self, other: _MovesSeen) -> Iterable[tuple[Hashable, Tensor, Tensor]]:
        """Yields the numbers of both forwards for each move that takes rows along axis 0."""
        for place, ((key, move), (same, _)) in enumerate(zip(self.moves, other.moves, strict=False)):
            one, two = self.lengths.get(place), other.lengths.get(place)
            if key == same and move.rows and one is not None and two is not None and one.shape == two.shape:
                yield key, one, two


def _forward(capture: Capture, run: Callable[[Any], Sequence[Tensor]], inputs: Any, examples: int) -> _MovesSeen:
    """Returns the moves of one forward."""
    moves = _MovesSeen()
    capture.begin(examples, _Ignored(), trace=[], moves=moves, inputs=opened(inputs))
    try:
        run(inputs)
    finally:
        capture.release()
    return moves


def _reached(
    capture: Capture, run: Callable[[Any], Sequence[Tensor]], inputs: Any, group: Tensor, axis: int
) -> Iterable[tuple[Any, Tensor]]:
    """Yields each site and shape at which rows seem merged, and the rows that a gradient of these examples reaches."""
    trace = RowsSeen()
    capture.begin(len(group), _Ignored(), trace=trace, moves=MovesMet(), inputs=opened(inputs))
    try:
        outputs = differentiable(run(inputs))
        capture.end(outputs)
        draws = [torch.arange(1.0, 1 + o.numel()).sin().view(o.shape).to(o) for o in outputs]  # none of them is zero
        torch.autograd.backward(outputs, [weighted(d, group.double(), axis) for d in draws])
    finally:
        capture.release()
    for (site, shape, layout), reached in trace.reached:
        merged = layout in (Layout.MERGED, Layout.SECOND_MERGED) or isinstance(layout, Turned)
        if merged and shape[layout.axis] == len(reached):
            yield (site, shape, layout.axis), reached
