"""The accountant by Rényi differential privacy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from privet.accounting.event import Relation
from privet.accounting.rdp import renyi_epsilon_at, trivial_epsilon
from privet.accounting.renyi import Cumulant
from privet.accounting.terms import reduce_event
from privet.opacus.accountants.accountant import StepAccountant, event_of

__all__ = ["RDPAccountant"]


def _least(bound: Callable[[float], float], orders: Sequence[float]) -> tuple[float, float]:
    """Returns the least bound over sorted orders, and its order. It is quasi-convex in them, and each is a bound."""
    known: dict[int, float] = {}

    def at(index: int) -> float:
        if index not in known:
            value = bound(orders[index])
            known[index] = math.inf if math.isnan(value) else value
        return known[index]

    low, high = 0, len(orders) - 1
    while high - low > 2:
        left = (low + high) // 2
        if at(left) <= at(left + 1):
            high = left + 1
        else:
            low = left
    return min(((at(index), orders[index]) for index in range(low, high + 1)), default=(math.inf, 0.0))


class RDPAccountant(StepAccountant):
    """ε by the Rényi divergences of the history at a list of orders (Mironov, arXiv 1702.07476)."""

    DEFAULT_ALPHAS: Sequence[float] = (*(1.0 + tenth / 10.0 for tenth in range(1, 100)), *map(float, range(12, 64)))

    def get_privacy_spent(self, *, delta: float, alphas: Sequence[float] | None = None) -> tuple[float, float]:
        """Returns ε at `delta` and the order that it comes from, the best of `alphas`."""
        if not self.history:
            return 0.0, 0.0
        reduced = reduce_event(event_of(self.history), relation=Relation.ADD_OR_REMOVE_ONE, group_size=1)
        trivial = trivial_epsilon(reduced, delta)
        if trivial is not None:
            return trivial, 0.0
        cumulant = Cumulant(reduced)
        orders = sorted(o for o in set(alphas or self.DEFAULT_ALPHAS) if 1.0 < o <= cumulant.largest_order)
        epsilon, order = _least(lambda order: renyi_epsilon_at(cumulant, order, delta), orders)
        return max(0.0, epsilon), order

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None) -> float:
        """Returns an upper bound on ε at `delta`: the least over the orders `alphas`."""
        return self.get_privacy_spent(delta=delta, alphas=alphas)[0]

    @classmethod
    def mechanism(cls) -> str:
        """Returns "rdp"."""
        return "rdp"
