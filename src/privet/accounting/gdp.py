"""The Gaussian accountant: one number μ that covers the whole curve. Never the central limit, which is no bound."""

from __future__ import annotations

from privet.accounting.accountant import Accountant, Bound
from privet.accounting.event import Event, Relation
from privet.accounting.gaussian import gaussian_delta, gaussian_epsilon
from privet.accounting.pld import PldAccountant
from privet.accounting.rdp import trivial_epsilon
from privet.accounting.terms import reduce_event

__all__ = ["GdpAccountant"]


class GdpAccountant(Accountant):
    """ε and δ by the smallest μ whose Gaussian covers the `"pld"` curve down to `smallest_delta`.

    Looser than `"pld"`, and one number for all (ε, δ) at once. A δ below `smallest_delta` lowers the limit.
    """

    name = "gdp"

    def __init__(self, *, smallest_delta: float = 1e-10) -> None:
        self.smallest_delta = smallest_delta
        self._curve = PldAccountant()

    def bound_epsilon(self, event: Event, delta: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns ε of the covering Gaussian; the lower bound is that of the curve it covers."""
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        low, notes = 0.0, reduced.notes
        if lower:
            low = self._curve.bound_epsilon(event, delta, relation=relation, group_size=group_size, lower=True).lower
        value = trivial_epsilon(reduced, delta)
        if value is None:
            floor = min(delta, self.smallest_delta)
            mu = self._curve.mu(event, smallest_delta=floor, relation=relation, group_size=group_size)
            value = gaussian_epsilon(mu, delta)
        return Bound(upper=value, lower=low, method=self.name, notes=notes)

    def bound_delta(self, event: Event, epsilon: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns δ of the covering Gaussian, or `smallest_delta` where that is more."""
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        low = 0.0
        if lower:
            low = self._curve.bound_delta(event, epsilon, relation=relation, group_size=group_size, lower=True).lower
        if reduced.infinite:
            value = 1.0
        elif not reduced.terms and reduced.squared_mu == 0.0:
            value = 0.0
        else:
            floor = self.smallest_delta if reduced.terms else 0.0
            mu = self._curve.mu(event, smallest_delta=self.smallest_delta, relation=relation, group_size=group_size)
            value = max(gaussian_delta(mu, epsilon), floor)
            # The covering ends 1e-6 below 1.
            value = 1.0 if value > 1.0 - 2e-6 else value
        return Bound(upper=value, lower=low, method=self.name, notes=reduced.notes)
