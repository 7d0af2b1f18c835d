"""The Rényi accountant: K(α) adds up, and the order that suits (ε, δ) is searched for, not listed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from privet.accounting.accountant import Accountant, Bound
from privet.accounting.certificate import Claim, certified_delta, certified_epsilon
from privet.accounting.event import Event, Relation
from privet.accounting.moments import rarest_epsilon_below
from privet.accounting.renyi import Cumulant
from privet.accounting.selected import EventCumulant
from privet.accounting.selection import Separated, separated
from privet.accounting.terms import Reduced, reduce_event

__all__ = [
    "AnyCumulant",
    "RdpAccountant",
    "best_order",
    "renyi_delta",
    "renyi_delta_at",
    "renyi_epsilon",
    "renyi_epsilon_at",
    "trivial_epsilon",
]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
SELECTED = "the best of a random number of runs is bounded by Rényi divergences of one run (arXiv 2110.03620)"


class AnyCumulant(Protocol):
    """K(α) of something, for 1 < α <= `largest_order`."""

    largest_order: float

    def __call__(self, order: float) -> float:
        """Returns K(α), or an upper bound."""

    def sketch(self) -> AnyCumulant:
        """Returns about the same cumulant: where to look, and no bound."""


def best_order(objective: Callable[[float], float], largest: float) -> tuple[float, float]:
    """Returns (least value found, its order) of an objective that is quasi-convex in α, over 1 < α <= largest.

    Powers of two of α - 1 bracket it, then golden sections close in; whatever order comes out, its value is a bound.
    """

    def order_of(exponent: float) -> float:
        return float(1.0 + 2.0**exponent)

    limit = math.log2(largest - 1.0)
    exponents = [0.0, 1.0, 2.0]
    values = [objective(order_of(exponent)) for exponent in exponents]
    # Outwards only for as long as it improves: large orders are dear.
    while exponents[-1] < limit and values[-1] <= min(values):
        exponents.append(min(exponents[-1] + 1.0, limit))
        values.append(objective(order_of(exponents[-1])))
    while exponents[0] > -12.0 and values[0] <= min(values):
        exponents.insert(0, exponents[0] - 1.0)
        values.insert(0, objective(order_of(exponents[0])))
    best = min(range(len(values)), key=values.__getitem__)
    low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
    found = [(values[best], order_of(exponents[best]))]

    def probe(exponent: float) -> float:
        order = order_of(exponent)
        found.append((objective(order), order))
        return found[-1][0]

    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    heights = [probe(each) for each in inner]
    for _ in range(12):
        if heights[0] <= heights[1]:
            high, inner[1], heights[1] = inner[1], inner[0], heights[0]
            inner[0] = high - _GOLDEN * (high - low)
            heights[0] = probe(inner[0])
        else:
            low, inner[0], heights[0] = inner[0], inner[1], heights[1]
            inner[1] = low + _GOLDEN * (high - low)
            heights[1] = probe(inner[1])
    return min(found)


def renyi_epsilon_at(cumulant: AnyCumulant, order: float, delta: float) -> float:
    """Returns ε at δ by one order. Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 12."""
    return (cumulant(order) - math.log(delta) - math.log(order)) / (order - 1.0) + math.log1p(-1.0 / order)


def renyi_delta_at(cumulant: AnyCumulant, order: float, epsilon: float) -> float:
    """Returns log δ at ε by one order: the same proposition, solved for δ."""
    return cumulant(order) - (order - 1.0) * (epsilon - math.log1p(-1.0 / order)) - math.log(order)


def renyi_epsilon(cumulant: AnyCumulant, delta: float) -> tuple[float, float]:
    """Returns the least (ε, α). With many terms the order is sought on a sketch, and the bound is of all of them."""
    sketch = cumulant.sketch()
    order = best_order(lambda order: renyi_epsilon_at(sketch, order, delta), cumulant.largest_order)[1]
    return max(0.0, renyi_epsilon_at(cumulant, order, delta)), order


def renyi_delta(cumulant: AnyCumulant, epsilon: float) -> tuple[float, float]:
    """Returns the least (log δ, α), in the same way."""
    sketch = cumulant.sketch()
    order = best_order(lambda order: renyi_delta_at(sketch, order, epsilon), cumulant.largest_order)[1]
    return min(0.0, renyi_delta_at(cumulant, order, epsilon)), order


def trivial_epsilon(reduced: Reduced, delta: float) -> float | None:
    """Returns ε where it needs no accountant: nothing released, everything released, or a δ that allows all or none."""
    if delta >= 1.0:
        return 0.0
    if reduced.infinite:
        return math.inf
    if not reduced.terms and reduced.squared_mu == 0.0:
        return 0.0
    return math.inf if delta == 0.0 else None


class RdpAccountant(Accountant):
    """Rényi differential privacy: quick, always valid, and some percent looser than `"pld"`."""

    name = "rdp"

    def bound_epsilon(self, event: Event, delta: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns Rényi's bound on ε, or the one without amplification where that is less; its lower bound is weak."""
        parts = separated(event)
        if parts is not None:
            return self.selected_epsilon(event, parts, delta, relation=relation, group_size=group_size, lower=lower)
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        trivial = trivial_epsilon(reduced, delta)
        if trivial is not None:
            return Bound(trivial, trivial if reduced.tight else 0.0, self.name, reduced.notes)
        value = renyi_epsilon(Cumulant(reduced), delta)[0]
        claim, known, notes = certified_epsilon(
            [Claim(value, self.name)],
            reduced=reduced,
            delta=delta,
            least=lambda: rarest_epsilon_below(reduced.terms, delta),
        )
        return Bound(
            upper=claim.value,
            lower=known if lower and reduced.tight else 0.0,
            method=claim.method,
            notes=reduced.notes + notes,
        )

    def bound_delta(self, event: Event, epsilon: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns Rényi's bound on δ, or the one without amplification where that is less; its lower bound is weak."""
        parts = separated(event)
        if parts is not None:
            return self.selected_delta(event, parts, epsilon, relation=relation, group_size=group_size, lower=lower)
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        trivial = 1.0 if reduced.infinite else None
        if trivial is None and not reduced.terms and reduced.squared_mu == 0.0:
            trivial = 0.0
        if trivial is not None:
            return Bound(trivial, trivial if reduced.tight else 0.0, self.name, reduced.notes)
        value = math.exp(renyi_delta(Cumulant(reduced), epsilon)[0])
        claim, known, notes = certified_delta(
            [Claim(value, self.name)], reduced=reduced, epsilon=epsilon, least=lambda: 0.0
        )
        return Bound(
            upper=claim.value,
            lower=known if lower and reduced.tight else 0.0,
            method=claim.method,
            notes=reduced.notes + notes,
        )

    def selected_epsilon(
        self, event: Event, parts: Separated, delta: float, *, relation: Relation, group_size: int, lower: bool
    ) -> Bound:
        """Returns Rényi's bound on ε of an event with selections; what is beside them bounds it from below."""
        known = self.bound_epsilon(parts.rest, delta, relation=relation, group_size=group_size, lower=lower)
        cumulant = EventCumulant(event, relation=relation, group_size=group_size)
        if delta >= 1.0:
            value = 0.0
        elif cumulant.infinite or delta == 0.0:
            value = math.inf
        else:
            value = renyi_epsilon(cumulant, delta)[0]
        return Bound(value, min(known.lower, value), self.name, (*cumulant.notes, SELECTED))

    def selected_delta(
        self, event: Event, parts: Separated, epsilon: float, *, relation: Relation, group_size: int, lower: bool
    ) -> Bound:
        """Returns Rényi's bound on δ of an event with selections; what is beside them bounds it from below."""
        known = self.bound_delta(parts.rest, epsilon, relation=relation, group_size=group_size, lower=lower)
        cumulant = EventCumulant(event, relation=relation, group_size=group_size)
        value = 1.0 if cumulant.infinite else math.exp(renyi_delta(cumulant, epsilon)[0])
        return Bound(value, min(known.lower, value), self.name, (*cumulant.notes, SELECTED))
