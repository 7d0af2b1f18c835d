"""The privacy loss distribution accountant: the default, and the tightest.

It reports the least of its own bound and Rényi's, and says which.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace

from privet._checks import check_positive
from privet.accounting.accountant import Accountant, Bound
from privet.accounting.event import Event, Relation
from privet.accounting.gaussian import gaussian_delta, gaussian_epsilon
from privet.accounting.grid import Goal, Grid, Readings, grid_for
from privet.accounting.rdp import renyi_delta, renyi_delta_at, renyi_epsilon, renyi_epsilon_at, trivial_epsilon
from privet.accounting.renyi import Cumulant
from privet.accounting.terms import Pair, Part, Reduced, Term, reduce_event

__all__ = ["PldAccountant"]

_SMALLEST_DELTA = 1e-200  # below it the masses leave the range of float64, and Rényi's bound is used alone
_KEPT_GRIDS = 12
_REFINEMENTS = 6


class PldAccountant(Accountant):
    """Connect-the-dots loss distributions, both directions composed on their own, by tilted Fourier transforms.

    Guarantees: every error is on the side of less privacy: the dots are connected above the curve, cut tails count
    as full disclosure, and the rounding of the transforms is added to the masses. What was only Gaussian and not
    sampled is exact. `tolerance` is how much of ε the grid may add, relative; it moves no bound to the wrong side.
    """

    name = "pld"

    def __init__(self, *, tolerance: float = 1e-4) -> None:
        self.tolerance = check_positive("tolerance", tolerance)
        self._grids: OrderedDict[Goal, Grid] = OrderedDict()

    def bound_epsilon(self, event: Event, delta: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns bounds on ε at δ."""
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        value = trivial_epsilon(reduced, delta)
        if value is None and not reduced.terms:
            value = gaussian_epsilon(math.sqrt(reduced.squared_mu), delta)
        if value is not None:
            low = value * (1.0 - 1e-9) if math.isfinite(value) else value
            return Bound(upper=value, lower=low, method=self.name, notes=reduced.notes)
        counts = _counts(reduced)
        cumulant = Cumulant(reduced)
        upper, method = math.inf, self.name
        readings, goal = self._at_delta(counts, cumulant, delta)
        if readings:
            upper = _epsilon_of(readings, delta)
        if goal.epsilon < upper or math.isnan(upper):
            upper, method = goal.epsilon, "rdp"
        low = 0.0
        if lower:
            epsilon, order = renyi_epsilon(cumulant, delta)
            low = min(self._low_epsilon(counts, Goal(epsilon, math.log(delta), order, upper), delta), upper)
        return Bound(upper=upper, lower=low, method=method, notes=reduced.notes)

    def bound_delta(self, event: Event, epsilon: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns bounds on δ at ε."""
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        value: float | None = None
        if reduced.infinite:
            value = 1.0
        elif not reduced.terms:
            value = gaussian_delta(math.sqrt(reduced.squared_mu), epsilon)
        if value is not None:
            return Bound(upper=value, lower=value * (1.0 - 1e-9), method=self.name, notes=reduced.notes)
        counts = _counts(reduced)
        cumulant = Cumulant(reduced)
        upper, method = 1.0, self.name
        readings, goal = self._at_epsilon(counts, cumulant, epsilon)
        if readings:
            upper = max(each.profile.delta(epsilon) for each in readings)
        quick = math.exp(goal.log_delta)
        if quick < upper or math.isnan(upper):
            upper, method = quick, "rdp"
        low = min(self._low_delta(counts, goal, epsilon), upper) if lower else 0.0
        return Bound(upper=upper, lower=low, method=method, notes=reduced.notes)

    def epsilon_near(
        self, event: Event, delta: float, limit: float, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE
    ) -> float:
        """Returns an upper bound on ε at δ, asked again on a finer grid where a kept one puts it just above `limit`.

        Grids that outlive a question are up to 3e-4 of ε coarser than a calibration's.
        """
        epsilon = self.epsilon(event, delta, relation=relation)
        if limit < epsilon <= limit * 1.001:
            finer = PldAccountant(tolerance=self.tolerance / 4.0)
            epsilon = min(epsilon, finer.epsilon(event, delta, relation=relation))
        return epsilon

    # -- grids: an old one where it still serves, a new one otherwise ------------------------------------------------

    def _at_delta(self, counts: dict[Term, int], cumulant: Cumulant, delta: float) -> tuple[list[Readings], Goal]:
        for goal, grid in reversed(list(self._grids.items())):
            if not -0.5 <= math.log(delta) - goal.log_delta <= 8.0 or not _alike(grid, counts):
                continue
            # Rényi's bound at the kept order is as valid as at the best one, and says where the answer must lie.
            quick = renyi_epsilon_at(cumulant, goal.order, delta)
            readings = self._reread(grid, counts, quick)
            if readings and _epsilon_of(readings, delta) > 0.6 * goal.aim:  # else it is coarser than it should be
                return readings, Goal(quick, math.log(delta), goal.order, quick)
        epsilon, order = renyi_epsilon(cumulant, delta)
        goal = Goal(epsilon, math.log(delta), order, epsilon)
        if epsilon == 0.0:
            return [], goal  # nothing is smaller, and no grid can be aimed at it
        readings = self._fresh(counts, goal)
        if readings and 0.0 < _epsilon_of(readings, delta) < 0.8 * epsilon:
            return self._refined(counts, goal, readings, delta), goal
        return readings, goal

    def _refined(self, counts: dict[Term, int], goal: Goal, readings: list[Readings], delta: float) -> list[Readings]:
        """Returns the readings of a grid fine enough that a finer one says the same, where Rényi's bound is loose.

        There the first grid was made for an ε that is too large, and what a grid adds cannot be told from the tilt.
        """
        tolerance, found = self.tolerance, _epsilon_of(readings, delta)
        for _ in range(_REFINEMENTS):
            self._grids.pop(goal, None)
            goal = replace(goal, aim=found)
            readings = self._fresh(counts, goal, tolerance=tolerance)
            before, found = found, _epsilon_of(readings, delta) if readings else 0.0
            if found <= 0.0 or found >= before * (1.0 - 3.0 * self.tolerance):
                break
            tolerance /= 16.0
        return readings

    def _at_epsilon(self, counts: dict[Term, int], cumulant: Cumulant, epsilon: float) -> tuple[list[Readings], Goal]:
        for goal, grid in reversed(list(self._grids.items())):
            if not _alike(grid, counts):
                continue
            quick = renyi_delta_at(cumulant, goal.order, epsilon)
            if -0.5 <= quick - goal.log_delta <= 6.0:
                readings = self._reread(grid, counts, goal.epsilon)
                if readings:
                    return readings, Goal(epsilon, quick, goal.order, epsilon)
        log_delta, order = renyi_delta(cumulant, epsilon)
        goal = Goal(epsilon, log_delta, order, max(epsilon, 1e-3))
        readings, aimed = self._fresh(counts, goal), goal
        for _ in range(6):
            # What a grid cuts off is sized by the δ it was made for, which Rényi's bound may put far too high.
            found = max((each.profile.delta(epsilon) for each in readings), default=0.0)
            if found == 0.0 or math.log(found) > aimed.log_delta - 2.5:
                break
            aimed = replace(aimed, log_delta=math.log(found))
            readings = self._fresh(counts, aimed)
        return readings, goal

    def _reread(self, grid: Grid, counts: dict[Term, int], epsilon: float) -> list[Readings]:
        """Returns what a kept grid says, or nothing if it does not fit or would be coarser than it should."""
        growth = epsilon / max(grid.goal.epsilon, 1e-9)
        if not 0.7 <= growth <= 1.5:
            return []
        for term in counts:
            grid.place(term)
        if grid.error(counts) > 3.0 * self.tolerance * growth * grid.goal.aim:
            return []
        self._grids.move_to_end(grid.goal)
        return grid.read(counts) or []

    def _fresh(self, counts: dict[Term, int], goal: Goal, *, tolerance: float | None = None) -> list[Readings]:
        """Returns the readings of a new grid, which is kept; none where δ is below what float64 can hold."""
        if goal.log_delta < math.log(_SMALLEST_DELTA):
            return []
        grid = grid_for(counts, goal, tolerance=tolerance or self.tolerance)
        self._grids[goal] = grid
        while len(self._grids) > _KEPT_GRIDS:
            self._grids.popitem(last=False)
        return grid.read(counts) or []

    # -- lower bounds ------------------------------------------------------------------------------------------------
    #
    # The dots' spread adds to each step's loss a ξ in (-h, h) with E[e^-ξ | loss] = 1, so with mean at most its
    # variance, and these sum to at most `mean + width` but with probability η (Bernstein's inequality, with the
    # variance known). Hence δ(ε) >= δ_grid(ε + mean + width) - η - mass moved up from below the grid.

    def _low_epsilon(self, counts: dict[Term, int], goal: Goal, delta: float) -> float:
        readings, step = self._fine(counts, goal)
        best = 0.0
        for each in readings:
            eta = delta * 1e-3
            shift = _shift(each.added, step, eta)
            best = max(best, each.profile.epsilon_below(delta + eta + each.raised) - shift)
        return best

    def _low_delta(self, counts: dict[Term, int], goal: Goal, epsilon: float) -> float:
        readings, step = self._fine(counts, goal)
        best = 0.0
        for each in readings:
            for eta in (math.exp(goal.log_delta) * factor for factor in (1e-3, 1e-5)):
                shift = _shift(each.added, step, max(eta, 1e-300))
                best = max(best, each.profile.delta_below(epsilon + shift) - eta - each.raised)
        return best

    def _fine(self, counts: dict[Term, int], goal: Goal) -> tuple[list[Readings], float]:
        if goal.log_delta < math.log(_SMALLEST_DELTA):
            return [], 0.0
        grid = grid_for(counts, goal, tolerance=self.tolerance / 64.0)
        return grid.read(counts) or [], grid.step


def _epsilon_of(readings: list[Readings], delta: float) -> float:
    return max(each.profile.epsilon(delta) for each in readings)


def _shift(added: float, step: float, eta: float) -> float:
    log = -math.log(eta)
    return added * (1.0 + step) + math.sqrt(2.0 * added * log) + step * log / 3.0


def _alike(grid: Grid, counts: dict[Term, int]) -> bool:
    """Whether the grid holds these terms, but for one or two that are cheap to add."""
    missing = grid.missing(counts)
    return missing == 0 or (missing <= 2 and missing < len(counts))


def _counts(reduced: Reduced) -> dict[Term, int]:
    """Returns the terms with their counts, what was not sampled among them as one Gaussian of rate 1."""
    counts = dict(reduced.terms)
    if reduced.squared_mu > 0.0:
        gaussian = Term(((1.0, Part(Pair.MIXTURE, 1.0, 1.0 / math.sqrt(reduced.squared_mu))),))
        counts[gaussian] = counts.get(gaussian, 0) + 1
    return counts
