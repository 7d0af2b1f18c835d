"""What the checks have seen of the moves of a model: which leave every row of the batch in its place.

Each move is known by its place in the code.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.batches.flat import Bags
from privet.gradients.capture.moves import Move
from privet.gradients.rules.arguments import named
from privet.gradients.tracing import tracing
from privet.gradients.turned import Turned

__all__ = ["KnownMoves", "MovesMet"]


_OPTIONS: dict[str, Any] = {
    "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "mode": "mean", "sparse": False,
    "per_sample_weights": None, "include_last_offset": False, "padding_idx": None,
}  # fmt: skip


class MovesMet:
    """The moves of one forward of a check, in order, each with its place in the code.

    Dropout draws more random numbers for more examples, and what is drawn after it (is this layer skipped?) would be
    another number. So a forward may follow another one: after each draw it goes on with that one's random numbers.

    Args:
        follows: the moves of a forward that is over.
    """

    def __init__(self, follows: MovesMet | None = None) -> None:
        self.moves: list[tuple[Hashable, Move]] = []
        self.bags: list[Bags] = []
        self.guessed: set[Hashable] = set()
        """The places at which rows were taken that were thought to lie by place."""
        self._follows = follows
        self.states = [torch.get_rng_state()]

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes note of the arguments of a call, if it looks bags up that lie in one row."""
        if func is not F.embedding_bag:
            return
        a = named(args, kwargs, input=None, weight=None, offsets=None, **_OPTIONS)
        if a is not None and isinstance(a.offsets, Tensor):
            self.bags.append(Bags(a.input, a.offsets, a.per_sample_weights, bool(a.include_last_offset)))

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
    by_place: bool | None = None  # whether axis 0, along which it moves, has as many rows for each example
    order: Turned | None = None  # in which axis 0 lies, along which it moves, if it was found not to lie as a rule
    whole: bool = True  # whether these were B and B + 1: the axis is the batch, and not merged with another one

    @property
    def where(self) -> Hashable:
        """Returns what was seen of where the rows lie."""
        return self.by_place, self.whole, frozenset(self.axes)


@dataclass
class KnownMoves:
    """What the checks have seen of all moves."""

    known: dict[Hashable, _Known] = field(default_factory=dict)

    def copy(self) -> KnownMoves:
        """Returns the same knowledge, which what is learned later does not change."""
        return KnownMoves({key: replace(k, axes=set(k.axes), static=set(k.static)) for key, k in self.known.items()})

    def learn(self, first: MovesMet, second: MovesMet, examples: tuple[int, int], *, whole: bool = True) -> bool:
        """Learns from the moves of the same model with B and with B + 1 examples.

        Args:
            first: the moves with B examples.
            second: the moves with B + 1 examples.
            examples: B and B + 1.
            whole: whether both forwards ran to their ends.

        Returns whether it was known before where rows lie by place, wherever some were taken.
        """
        small, large = examples
        before = {key: known.where for key, known in self.known.items()}
        pairs: dict[Hashable, tuple[list[Move], list[Move]]] = {}
        for which, met in enumerate((first, second)):
            for key, move in met.moves:
                pairs.setdefault(key, ([], []))[which].append(move)
        for key, (fewer, more) in pairs.items():
            known = self.known.setdefault(key, _Known())
            if whole and len(fewer) != len(more):  # as often as there are examples, say
                known.grew, known.whole, known.axes = True, False, set(range(len((fewer or more)[0].sizes)))
            for one, two in zip(fewer, more, strict=False):
                axes = {i for i, (n, m) in enumerate(zip(one.sizes, two.sizes, strict=False)) if n != m}
                known.axes |= axes
                known.whole &= all((one.sizes[i], two.sizes[i]) == examples for i in axes)
                known.grew = known.grew or bool(axes) or len(one.sizes) != len(two.sizes)
                if one.static is not None and one.static == two.static:
                    known.static.add(one.static)
                lies = one.rows is not None and two.rows is not None and one.rows % small == 0
                lies = lies and one.rows // small * large == two.rows  # type: ignore[operator]
                known.by_place = lies and known.by_place is not False
        guessed = {key for met in (first, second) for key in met.guessed}
        return all(key in before and before[key] == self.known[key].where for key in guessed)

    def lies(self, key: Hashable, move: Move, axis: int) -> bool | None:
        """Returns whether rows that are taken along an axis lie by place, or None if it was not seen.

        On axis 0 there may be several rows of each example. On another one, the examples lie alone.
        """
        known = self.known.get(key)
        if known is None:
            return None
        if axis == 0 and known.by_place:
            return True
        if not known.whole or len(known.axes) != 1:
            return False
        (place,) = known.axes
        return move.axes is not None and place < len(move.axes) and move.axes[place] == axis

    def order(self, key: Hashable) -> Turned | None:
        """Returns the order of the rows that are taken here, if they were found not to lie as a rule."""
        known = self.known.get(key)
        return None if known is None else known.order

    def turn(self, key: Hashable, order: Turned) -> None:
        """Takes note of the order of the rows that are taken here."""
        known = self.known.setdefault(key, _Known())
        known.order, known.grew = order, True

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
