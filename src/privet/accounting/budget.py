"""The budget: whether the next steps fit, asked of the accountant as seldom and as cheaply as the answer allows.

Three things keep it cheap. An answer covers many steps: what fits with `m` more steps of a reference event fits with
any `m` steps that the reference dominates. A history of many different events is asked about as one of fewer events
that dominate it, and only where that does not fit more exactly. And how far to look ahead is interpolated from the
answers so far. Every answer that lets a step begin is an upper bound on ε, so none of this can overspend; the step
that is refused was refused by the accountant on the exact history.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from privet._checks import check_at_least, check_target_delta
from privet.accounting.accountant import Accountant
from privet.accounting.dominance import coarser, dominates, drift, shape, worst
from privet.accounting.event import Event, Relation
from privet.accounting.phases import composed
from privet.errors import BudgetExceededError

__all__ = ["Budget", "BudgetMeter"]

_WIDTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # of the grids on which a history is rounded
_FEW = (32, 256)  # different events: what a first, quick question and a second, sharper one may cost
_RECENT = 64  # events from which the coming ones are guessed
_MOST_AHEAD = 2**40
_MOST_MARGIN = 0.5


@dataclass(frozen=True)
class Budget:
    """The most that may be spent: ε at δ.

    A budget must not look at what was released: it bounds mechanisms whose noise multipliers, rates and number of
    steps were chosen beforehand, or from public numbers.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check_at_least("epsilon", self.epsilon))
        object.__setattr__(self, "delta", check_target_delta("delta", self.delta, least=0.0))


class BudgetMeter:
    """Refuses steps that would exceed a budget, for a history that only grows.

    Guarantees: a step is let through only after the accountant bounded ε, at the budget's δ, of a history that
    dominates the one with this step; it is refused only after the accountant was asked about that very history. This
    needs nothing of the accountant but that its bounds are bounds, so it holds for one of a user's own.
    """

    def __init__(self, budget: Budget, accountant: Accountant, relation: Relation) -> None:
        self._budget = budget
        self._accountant = accountant
        self._relation = relation
        self._headroom: dict[Event, int] = {}  # steps of each reference event that are known to fit
        self._recent: deque[tuple[Event, int]] = deque(maxlen=_RECENT)
        self._grid = dict.fromkeys(_FEW, 0)  # the index in _WIDTHS of the finest grid that may still do
        self._ahead = 1  # steps to look ahead at the next question

    def admit(self, event: Event, count: int, begun: Mapping[Event, int]) -> None:
        """Uses up headroom for `count` steps of `event` on top of what was begun.

        Raises:
            BudgetExceededError: if they would exceed the budget.
        """
        self._recent.append((event, count))
        if self._covered(event, count):
            return
        self._headroom = {}
        epsilon = math.inf
        for history, exact in self._histories(begun):
            epsilon = self._look_ahead(history, event, count, exact=exact)
            if epsilon <= self._budget.epsilon:
                return
        self._recent.pop()  # it does not begin, and is no sign of what is coming
        raise BudgetExceededError(
            f"The next {count} of {event} would bring ε to {epsilon:.6g} at δ = {self._budget.delta:g}; the budget "
            f"is ε = {self._budget.epsilon:g}. Nothing was begun. Stop here, or allow more."
        )

    def began(self, event: Event, count: int) -> None:
        """Takes note of steps that began without a question, such as another run's."""
        if not self._covered(event, count):
            self._headroom = {}

    def _covered(self, event: Event, count: int) -> bool:
        """Uses up headroom for the steps, and returns whether there was enough of it."""
        for reference, left in self._headroom.items():
            if left >= count and dominates(reference, event):
                self._headroom[reference] = left - count
                return True
        return False

    def _histories(self, begun: Mapping[Event, int]) -> Iterator[tuple[Mapping[Event, int], bool]]:
        """Yields histories that dominate what was begun, the cheapest first, and that itself as the last."""
        for most in _FEW:
            if len(begun) <= most:
                break
            # The finest grid that leaves few enough. A history only grows, so a grid that was too fine remains so.
            for width in _WIDTHS[self._grid[most] :]:
                rounded = coarser(begun, width)
                if len(rounded) <= most:
                    yield rounded, False
                    break
                self._grid[most] += 1
        yield begun, True

    def _look_ahead(self, history: Mapping[Event, int], event: Event, count: int, *, exact: bool) -> float:
        """Returns ε with `count` of `event`; where that fits, keeps as headroom what fits beyond it."""
        budget = self._budget.epsilon
        too_far: tuple[int, float] | None = None
        if self._ahead > count:
            epsilon = self._try(history, event, count, self._ahead, exact=exact)
            if epsilon <= budget:
                self._ahead = min(2 * self._ahead, _MOST_AHEAD)
                return epsilon
            too_far = (self._ahead, epsilon)
        nearest = (self._epsilon if exact else self._guess)(history, {event: count}, exact=exact)
        if not nearest <= budget:
            return nearest if not math.isnan(nearest) else math.inf
        if too_far is None:
            self._ahead = 2 * count
            return nearest
        for _ in range(3):
            steps, epsilon = too_far
            # ε rises less than in proportion, so the straight line to a point too far away is a little too hopeful.
            share = (budget - nearest) / (epsilon - nearest) if epsilon > nearest else 0.0
            steps = count + int((steps - count) * min(share, 1.0) * 0.95)
            if steps <= count:
                break
            epsilon = self._try(history, event, count, steps, exact=exact)
            if epsilon <= budget:
                self._ahead = max(1, steps // 8)
                return epsilon
            too_far = (steps, epsilon)
        self._ahead = max(1, count)
        return nearest

    def _try(self, history: Mapping[Event, int], event: Event, count: int, steps: int, *, exact: bool) -> float:
        """Returns ε with `steps` of what is likely to come; where that fits, keeps it as headroom less `count`."""
        coming = self._coming(steps)
        reference = next(each for each in coming if dominates(each, event))
        coming[reference] = max(coming[reference], count)
        epsilon = self._guess(history, coming, exact=exact)
        if epsilon <= self._budget.epsilon:
            coming[reference] -= count
            self._headroom = coming
        return epsilon

    def _coming(self, steps: int) -> dict[Event, int]:
        """Returns events, one for each recent shape, that are likely to dominate the next `steps`, with their shares.

        Whether they do dominate them is checked when the steps come. A trend goes on: noise that fell by a tenth
        between the halves of the recent events is expected to fall further at that pace.
        """
        groups: dict[object, list[tuple[Event, int]]] = {}
        for event, count in self._recent:
            groups.setdefault(shape(event), []).append((event, count))
        total = sum(count for _, count in self._recent)
        found: dict[Event, int] = {}
        for group in groups.values():
            events = [event for event, _ in group]
            share = sum(count for _, count in group) / total
            found[worst(events, margin=_trend(events, steps * share))] = math.ceil(steps * share)
        return found

    def _guess(self, history: Mapping[Event, int], more: Mapping[Event, int], *, exact: bool) -> float:
        """Returns ε of what need not happen: infinity where the accountant cannot say."""
        try:
            return self._epsilon(history, more, exact=exact)
        except ArithmeticError:
            return math.inf

    def _epsilon(self, history: Mapping[Event, int], more: Mapping[Event, int], *, exact: bool) -> float:
        counts = dict(history)
        for event, count in more.items():
            counts[event] = counts.get(event, 0) + count
        asked, budget = composed(counts), self._budget
        if not exact:
            return self._accountant.epsilon(asked, budget.delta, relation=self._relation)
        return self._accountant.epsilon_near(asked, budget.delta, budget.epsilon, relation=self._relation)


def _trend(events: list[Event], steps: float) -> tuple[float, float]:
    """Returns by how much noise may fall and a rate rise within `steps`, as differences of logarithms."""
    half = len(events) // 2
    if half == 0:
        return 0.0, 0.0
    fall, rise = drift(worst(events[:half]), worst(events[half:]))
    pace = 1.25 * steps / half
    return min(fall * pace, _MOST_MARGIN), min(rise * pace, _MOST_MARGIN)
