"""What a selection costs: bounds on the best of a random number of runs, from bounds on one run.

Let Q be one run, f(x) = E[x^K] and A the release. With u = Q(better than y) the density of A at y is f'(1 - u) times
that of Q, and u is the chance of an event under Q, so that u' <= e^ε u + δ for neighbors wherever Q is (ε, δ)-private.
Both kinds of bounds follow from this: those by Rényi divergences are the theorems 2 and 6 of Papernot and Steinke
(arXiv 2110.03620), those by privacy profiles are in the manner of Koskela, Redberg and Wang (arXiv 2402.06701).
Both hold for ties and for scores of any kind, and all of them are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from privet.accounting.event import Event, PoissonSelectionEvent, Relation
from privet.accounting.renyi import Cumulant
from privet.accounting.selection import SelectionEvent, Separated, separated
from privet.accounting.terms import reduce_event

__all__ = ["EventCumulant", "profile_shift", "selection_cumulant"]

_SLACK = 1e-9  # relative; what rounding may have taken
_HALVINGS = 14  # of the interval in which the shift of a profile lies


def selection_cumulant(
    event: SelectionEvent, base: Callable[[float], float], orders: list[float]
) -> Callable[[float], float]:
    """Returns K(α) = log E[(A/A')^α] of a selection, given K of one run in either direction.

    Theorem 2 with (1 - 1/λ) ε(λ) = K(λ) / λ, and theorem 6 with δ from the Rényi divergences of one run. To the latter
    the chance of no run at all is added, which is the same for neighbors.

    Args:
        event: how often a run is repeated.
        base: K of one run; any upper bound.
        orders: at which orders K of one run is looked at for the part of the bound that does not depend on α.
    """
    log_mean = math.log(event.mean_runs) + _SLACK
    known = np.array([(order, base(order)) for order in orders]).T
    if not isinstance(event, PoissonSelectionEvent):
        # λ = 1 is allowed, where K is 0.
        least = min(-math.log(event.success), float(((known[1] - math.log(event.success)) / known[0]).min()))
        extra = (1.0 + event.shape) * least * (1.0 + _SLACK)
        return lambda order: base(order) + (order - 1.0) * extra + max(log_mean, 0.0)
    mean = event.mean

    def poisson(order: float) -> float:
        epsilon = -math.log1p(-1.0 / order)  # the largest with e^ε <= 1 + 1 / (α - 1)
        # Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 12.
        logs = known[1] - (known[0] - 1.0) * (epsilon - np.log1p(-1.0 / known[0])) - np.log(known[0])
        delta = min(1.0, math.exp(min(0.0, float(logs.min()))) * (1.0 + _SLACK))
        return float(np.logaddexp(-mean, base(order) + log_mean + (order - 1.0) * mean * delta))

    return poisson


def profile_shift(event: SelectionEvent, delta_of: Callable[[float], float]) -> float:
    """Returns s such that δ of the selection at ε is at most E[K] δ of one run at ε - s, for every ε >= s.

    The density of A is f'(1 - u) <= f'(1) = E[K] times that of Q, and s bounds log f'(1 - u) - log f'(1 - u').

    * Truncated negative binomial: f'(1 - u) = E[K] (1 + u (1 - γ) / γ)^-(1 + η). With u' <= e^ε u + δ the ratio is
      largest at an end of u, so that s = (1 + η) max(ε, log(1 + δ (1 - γ) / γ)) for any ε.
    * Poisson: the ratio is e^(mean (u' - u)), and u' - u is at most δ at ε = 0.

    Args:
        event: how often a run is repeated.
        delta_of: an upper bound on δ of one run at ε >= 0, in either direction.
    """
    if isinstance(event, PoissonSelectionEvent):
        return event.mean * delta_of(0.0) * (1.0 + _SLACK)
    odds = (1.0 - event.success) / event.success
    low, high = 0.0, math.log1p(odds * delta_of(0.0))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        if math.log1p(odds * delta_of(middle)) <= middle:
            high = middle
        else:
            low = middle
    return (1.0 + event.shape) * high * (1.0 + _SLACK)


class EventCumulant:
    """The cumulant K(α) of an event that may hold selections, with what `Cumulant` offers.

    Attributes:
        infinite: whether some part is without protection, or unknown.
        notes: what the parts noted.
    """

    def __init__(self, event: Event, *, relation: Relation, group_size: int) -> None:
        parts = separated(event) or Separated(event, {})
        reduced = reduce_event(parts.rest, relation=relation, group_size=group_size)
        self._rest = Cumulant(reduced)
        self.largest_order: float = self._rest.largest_order
        self.infinite: bool = reduced.infinite
        notes = dict.fromkeys(reduced.notes)
        self._selected: list[tuple[Callable[[float], float], int]] = []
        for selection, count in parts.selections.items():
            one = EventCumulant(selection.event, relation=relation, group_size=group_size)
            self.infinite |= one.infinite
            self.largest_order = min(self.largest_order, one.largest_order)
            notes |= dict.fromkeys(one.notes)
            if not one.infinite:
                self._selected.append((selection_cumulant(selection, one, _orders(one.largest_order)), count))
        self.notes: tuple[str, ...] = tuple(notes)

    def __call__(self, order: float) -> float:
        """Returns K(α), for 1 < α <= `largest_order`."""
        return self._rest(order) + sum(count * cumulant(order) for cumulant, count in self._selected)

    def sketch(self) -> EventCumulant:
        """Returns the cumulant itself: there is no quicker one to look around with."""
        return self


def _orders(largest: float) -> list[float]:
    """Returns orders from near 1 to `largest`, four for each doubling of α - 1."""
    steps = np.arange(-24.0, 4.0 * math.log2(min(largest, 1e5) - 1.0) + 1.0)
    return [min(order, largest) for order in (1.0 + 2.0 ** (steps / 4.0)).tolist()]
