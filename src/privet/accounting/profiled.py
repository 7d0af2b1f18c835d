"""Selections for an accountant that knows privacy profiles: the less of Rényi's bound and that by one run's profile."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from privet.accounting.accountant import Accountant, Bound
from privet.accounting.event import Event, Relation
from privet.accounting.rdp import RdpAccountant
from privet.accounting.selected import profile_shift
from privet.accounting.selection import SelectionEvent, Separated

__all__ = ["ProfiledSelections"]

_ANCHORS = 12
_FARTHEST = 1e-6  # the δ of one run at the last anchor
_SAID = "the best of a random number of runs is bounded by the privacy profile of one run (arXiv 2402.06701)"


class _Curve(NamedTuple):
    """What is kept of a selection: its shift, and some points (ε, δ) on the bound of its curve."""

    shift: float
    anchors: tuple[tuple[float, float], ...]

    # Whatever is (ε, δ)-private is dominated by randomized response with disclosure δ, whose δ at ε' <= ε is
    # δ + (1 - δ) (e^ε - e^ε') / (1 + e^ε): Kairouz, Oh and Viswanath, arXiv 1311.0776, theorem 3.2.

    def implied_delta(self, epsilon: float) -> float:
        """Returns δ at `epsilon` by the anchors above it."""
        best = 1.0
        for above, delta in self.anchors:
            if above >= epsilon:
                share = -math.expm1(epsilon - above) / (1.0 + math.exp(-above))
                best = min(best, delta + (1.0 - delta) * share)
        return best

    def implied_epsilon(self, delta: float) -> float:
        """Returns ε at `delta` by the anchors that have less: the same, solved for ε'."""
        best = math.inf
        for above, less in self.anchors:
            if less <= delta:
                share = (delta - less) / (1.0 - less) * (1.0 + math.exp(-above))
                best = min(best, above + math.log1p(-share) if share < 1.0 else 0.0)
        return max(best, 0.0)


class ProfiledSelections:
    """Bounds events that hold selections. The profile serves where a selection is all there is, Rényi's bound always.

    Args:
        accountant: what is asked about one run, and about what lies beside the selections.
    """

    def __init__(self, accountant: Accountant) -> None:
        self._accountant = accountant
        self._renyi = RdpAccountant()
        self._kept: tuple[object, _Curve] = (None, _Curve(0.0, ()))

    def epsilon(
        self, event: Event, parts: Separated, delta: float, *, relation: Relation, group_size: int, lower: bool
    ) -> Bound:
        """Returns bounds on ε at δ; what lies beside the selections bounds it from below."""
        ask = self._accountant.bound_epsilon
        known = ask(parts.rest, delta, relation=relation, group_size=group_size, lower=lower)
        best = self._renyi.selected_epsilon(event, parts, delta, relation=relation, group_size=group_size, lower=False)
        if parts.only is not None and 0.0 < delta < 1.0:
            share = min(1.0, delta / parts.only.mean_runs * (1.0 - 1e-12))
            one = ask(parts.only.event, share, relation=relation, group_size=group_size, lower=False)
            curve = self._curve(parts.only, relation, group_size)
            value = min(one.upper + curve.shift, curve.implied_epsilon(delta) * (1.0 + 1e-9) + 1e-12)
            if value < best.upper:
                best = Bound(value, 0.0, self._accountant.name, (*one.notes, _SAID))
        return replace(best, lower=min(known.lower, best.upper))

    def delta(
        self, event: Event, parts: Separated, epsilon: float, *, relation: Relation, group_size: int, lower: bool
    ) -> Bound:
        """Returns bounds on δ at ε; what lies beside the selections bounds it from below."""
        ask = self._accountant.bound_delta
        known = ask(parts.rest, epsilon, relation=relation, group_size=group_size, lower=lower)
        best = self._renyi.selected_delta(event, parts, epsilon, relation=relation, group_size=group_size, lower=False)
        if parts.only is not None:
            curve = self._curve(parts.only, relation, group_size)
            value = curve.implied_delta(epsilon)
            if epsilon >= curve.shift:
                one = ask(
                    parts.only.event, epsilon - curve.shift, relation=relation, group_size=group_size, lower=False
                )
                value = min(value, one.upper * parts.only.mean_runs)
            if value < best.upper:
                best = Bound(min(1.0, value * (1.0 + 1e-12)), 0.0, self._accountant.name, (*best.notes[:-1], _SAID))
        return replace(best, lower=min(known.lower, best.upper))

    def _curve(self, selection: SelectionEvent, relation: Relation, group_size: int) -> _Curve:
        """Returns the curve of a selection, kept for the next question about the same one."""
        key = (selection, relation, group_size)
        if self._kept[0] != key:

            def delta_of(epsilon: float) -> float:
                return self._accountant.delta(selection.event, epsilon, relation=relation, group_size=group_size)

            shift = profile_shift(selection, delta_of)
            far = self._accountant.epsilon(selection.event, _FARTHEST, relation=relation, group_size=group_size)
            places = [far * index / _ANCHORS for index in range(_ANCHORS + 1)] if math.isfinite(far) else []
            anchors = ((shift + each, selection.mean_runs * delta_of(each)) for each in places)
            self._kept = (key, _Curve(shift, tuple((above, delta) for above, delta in anchors if delta < 1.0)))
        return self._kept[1]
