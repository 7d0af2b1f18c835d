"""The privacy loss distribution accountant: the default, and the tightest.

A question is answered in four steps. `moments` says where on the curve the answer lies, without composing anything.
`grid` composes there. What comes back says how good it is: whether the window held the answer, how much of δ was lost
to rounding and tails, how much the spacing added; where that is not good enough, tilt or spacing follow what was found
and it is composed again. The least of all answers is taken, since each is an upper bound. At last `certificate` holds
it against bounds that were found in other ways.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

from privet._checks import check_positive
from privet.accounting.accountant import Accountant, Bound
from privet.accounting.aim import content, eased, first_place, followed, heavy_place, place_of_epsilon, unfit
from privet.accounting.certificate import Claim, certified_delta, certified_epsilon
from privet.accounting.event import Event, Relation
from privet.accounting.gaussian import gaussian_delta, gaussian_epsilon
from privet.accounting.goal import CUTS, Goal, Place
from privet.accounting.grid import Grid
from privet.accounting.moments import Law, laws, rarest_epsilon_below
from privet.accounting.planning import grid_for
from privet.accounting.profiled import ProfiledSelections
from privet.accounting.rdp import renyi_delta, renyi_epsilon, trivial_epsilon
from privet.accounting.renyi import Cumulant
from privet.accounting.selection import separated
from privet.accounting.terms import Pair, Part, Reduced, Term, reduce_event

__all__ = ["PldAccountant"]

_SMALLEST_DELTA = 1e-200  # below it the masses leave the range of float64, and Rényi's bound is used alone
_LOG_TOLERANCE = 2e-4  # of δ, relative, where δ is asked for
_MANY = 64  # terms, above which the place is sought on a sample of about
_SAMPLE = 16  # of them
_KEPT_GRIDS = 12
_ATTEMPTS = 3


class _Tried(NamedTuple):
    """An upper bound on ε, and the grid that gave it."""

    epsilon: float
    grid: Grid


class PldAccountant(Accountant):
    """Connect-the-dots loss distributions, both directions composed on their own, by tilted Fourier transforms.

    Guarantees: every error is on the side of less privacy: the dots are connected above the curve, cut tails count
    as full disclosure, what a window does not hold counts in full, and the rounding of the transforms is added to the
    masses. What was only Gaussian and not sampled is exact. `tolerance` is how much of ε the grid may add, relative; it
    moves no bound to the wrong side.
    """

    name = "pld"

    def __init__(self, *, tolerance: float = 1e-4) -> None:
        self.tolerance = check_positive("tolerance", tolerance)
        self._grids: OrderedDict[Goal, Grid] = OrderedDict()
        self._selections = ProfiledSelections(self)

    # -- the two questions -------------------------------------------------------------------------------------------

    def bound_epsilon(self, event: Event, delta: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns bounds on ε at δ."""
        parts = separated(event)
        if parts is not None:
            return self._selections.epsilon(event, parts, delta, relation=relation, group_size=group_size, lower=lower)
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        value = trivial_epsilon(reduced, delta)
        if value is None and not reduced.terms:
            value = gaussian_epsilon(math.sqrt(reduced.squared_mu), delta)
        if value is not None:
            low = value * (1.0 - 1e-9) if math.isfinite(value) else value
            return Bound(value, low if reduced.tight else 0.0, self.name, reduced.notes)
        counts = _counts(reduced)
        both = laws(counts, _tail(delta, counts))
        bound, tilt = max(law.epsilon(delta) for law in both)
        claims: list[Claim] = []
        places: tuple[Place, ...] = ()
        if math.log(delta) >= math.log(_SMALLEST_DELTA):
            found, places = self._epsilon_on_grids(counts, both, delta)
            claims.append(Claim(found, self.name))
        if not claims or claims[0].value > 0.9 * bound:
            # The saddle point's own bound is nearly as good, or better: Rényi's bound is worth its search.
            claims.append(Claim(renyi_epsilon(Cumulant(reduced), delta)[0], "rdp"))

        def least() -> float:
            return max(_least_epsilon(counts, delta, tilt), rarest_epsilon_below(counts, delta))

        claim, known, notes = certified_epsilon(claims, reduced=reduced, delta=delta, least=least)
        low = 0.0
        if lower and reduced.tight:
            low = min(max(known, self._epsilon_below(counts, both, places, delta)), claim.value)
        return Bound(upper=claim.value, lower=low, method=claim.method, notes=(*reduced.notes, *notes))

    def bound_delta(self, event: Event, epsilon: float, *, relation: Relation, group_size: int, lower: bool) -> Bound:
        """Returns bounds on δ at ε."""
        parts = separated(event)
        if parts is not None:
            return self._selections.delta(event, parts, epsilon, relation=relation, group_size=group_size, lower=lower)
        reduced = reduce_event(event, relation=relation, group_size=group_size)
        value: float | None = None
        if reduced.infinite:
            value = 1.0
        elif not reduced.terms:
            value = gaussian_delta(math.sqrt(reduced.squared_mu), epsilon)
        if value is not None:
            return Bound(value, value * (1.0 - 1e-9) if reduced.tight else 0.0, self.name, reduced.notes)
        counts = _counts(reduced)
        both, log_delta = _about_delta(counts, epsilon)
        log_delta = max(log_delta, _log_disclosed(counts))
        tilt = max(law.log_delta(epsilon) for law in both)[1]
        claims: list[Claim] = []
        places: tuple[Place, ...] = ()
        if log_delta >= math.log(_SMALLEST_DELTA):
            found, places = self._delta_on_grids(counts, epsilon, both, log_delta)
            claims.append(Claim(found, self.name))
        if not claims or claims[0].value <= 0.0 or math.log(claims[0].value) > log_delta + 1.0:
            claims.append(Claim(math.exp(renyi_delta(Cumulant(reduced), epsilon)[0]), "rdp"))

        def least() -> float:
            return _least_delta(counts, epsilon, tilt, claims[0].value)

        claim, known, notes = certified_delta(claims, reduced=reduced, epsilon=epsilon, least=least)
        low = 0.0
        if lower and reduced.tight:
            low = min(max(known, self._delta_below(counts, both, places, epsilon)), claim.value)
        return Bound(upper=claim.value, lower=low, method=claim.method, notes=(*reduced.notes, *notes))

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

    # -- ε of δ --------------------------------------------------------------------------------------------------------

    def _epsilon_on_grids(
        self, counts: dict[Term, int], both: tuple[Law, ...], delta: float
    ) -> tuple[float, tuple[Place, ...]]:
        """Returns the least ε of the grids that were tried, and where it was found."""
        for goal, grid in self._kept(counts):
            if -1.0 <= math.log(delta) - goal.log_delta <= 8.0:
                answers = grid.answers(counts, delta)
                if answers and not unfit(answers, both, grid, 3.0 * self.tolerance):
                    self._grids.move_to_end(goal)
                    return max(each.epsilon for each in answers), goal.places
        best = self._best(_sketch(counts), delta)
        if best is not None and len(counts) > _MANY:
            # Where to look was found on a sample of the terms; all of them are composed once, there.
            grid = grid_for(counts, both, best.grid.goal)
            answers = grid.answers(counts, delta)
            best = None if answers is None else _Tried(max(each.epsilon for each in answers), grid)
        if best is None:
            return math.inf, ()
        if sum(counts.values()) > 1:
            self._keep(best.grid.goal, best.grid)
        return best.epsilon, best.grid.goal.places

    def _best(self, counts: dict[Term, int], delta: float) -> _Tried | None:
        """Returns the best of the grids that were tried, with larger and larger cuts until one is good enough."""
        best: _Tried | None = None
        for cut in CUTS:
            tried, good = self._attempts(counts, laws(counts, _tail(delta, counts, cut)), delta, cut)
            if tried is not None and (best is None or tried.epsilon < best.epsilon):
                best = tried
            if good:
                break
        return best

    def _attempts(
        self, counts: dict[Term, int], both: tuple[Law, ...], delta: float, cut: float
    ) -> tuple[_Tried | None, bool]:
        """Returns the best of a few grids, each where the answer before lay, and whether it is good enough."""
        log_delta, starts = math.log(delta), [law.epsilon(delta) for law in both]
        places = tuple(first_place(law, delta, *start) for law, start in zip(both, starts, strict=True))
        best: _Tried | None = None
        for _ in range(_ATTEMPTS):
            places = eased(places, log_delta)
            grid = grid_for(counts, both, Goal(log_delta, places, self.tolerance, cut=cut))
            answers = grid.answers(counts, delta)
            if answers is None:
                break
            tried = _Tried(max(each.epsilon for each in answers), grid)
            split_before = best is not None and best.grid.goal.splits and not grid.goal.splits
            stuck = best is not None and tried.epsilon >= best.epsilon * (1.0 - 1e-3) and not split_before
            if best is None or tried.epsilon < best.epsilon:
                best = tried
            lacking = unfit(answers, both, grid, content(grid, counts) * self.tolerance)
            if not lacking:
                return best, True
            following = tuple(
                followed(place, answer, start, lacking=side in lacking)
                for side, (place, answer, start) in enumerate(zip(places, answers, starts, strict=True))
            )
            if stuck or following == places:
                break
            places = following
        return best, False

    def _kept(self, counts: dict[Term, int]) -> list[tuple[Goal, Grid]]:
        """Returns the kept grids that may serve, the latest first, those of the very counts before all others."""
        able = [(goal, grid) for goal, grid in reversed(self._grids.items()) if _alike(grid, counts)]
        return sorted(able, key=lambda each: not each[1].holds(counts))

    def _keep(self, goal: Goal, grid: Grid) -> None:
        self._grids[goal] = grid
        while len(self._grids) > _KEPT_GRIDS:
            self._grids.popitem(last=False)

    # -- δ of ε --------------------------------------------------------------------------------------------------------

    def _delta_on_grids(
        self, counts: dict[Term, int], epsilon: float, both: tuple[Law, ...], log_delta: float
    ) -> tuple[float, tuple[Place, ...]]:
        """Returns the least δ of the grids that were tried, and where it was found."""
        for goal, grid in self._kept(counts):
            if abs(log_delta - goal.log_delta) <= 12.0:
                found = self._delta_on(grid, counts, epsilon, both)
                if found is not None:
                    self._grids.move_to_end(goal)
                    return found, goal.places
        best = 1.0
        tried: tuple[Place, ...] = ()
        for cut in CUTS:
            both = laws(counts, _tail(math.exp(log_delta), counts, cut))
            # A tilt of 2 log(1/δ) / ε shows that the smaller direction is below δ; a larger one needs a finer spacing.
            enough = -2.0 * min(log_delta, -1.0) / max(epsilon, 1e-12)
            places = tuple(
                replace(place, tilt=min(place.tilt, enough), slope=min(place.slope, enough))
                for place in (place_of_epsilon(law, epsilon) for law in both)
            )
            goal = Goal(log_delta, places, self.tolerance, log_tolerance=_LOG_TOLERANCE, cut=cut)
            grid = grid_for(counts, both, goal)
            profiles = grid.read(counts)
            if profiles is None:
                break
            found = max(profile.delta(epsilon) for profile in profiles)
            if found < best or not tried:
                best, tried = found, places
                if sum(counts.values()) > 1:
                    self._keep(goal, grid)
            # What a grid cuts off is sized by the δ that it was made for.
            good = self._delta_on(grid, counts, epsilon, both) is not None
            if found <= 0.0 or (good and math.log(found) > log_delta - 3.0):
                break
            log_delta = min(log_delta, math.log(found))
        return best, tried

    def _delta_on(self, grid: Grid, counts: dict[Term, int], epsilon: float, both: tuple[Law, ...]) -> float | None:
        """Returns δ at ε on a kept grid, or None where that grid is too coarse for it."""
        profiles = grid.read(counts)
        if profiles is None or len(profiles) != len(both):
            return None
        found = [profile.delta(epsilon) for profile in profiles]
        if not 0.0 < max(found) < 1.0:
            return None
        for side, (profile, law) in enumerate(zip(profiles, both, strict=True)):
            if found[side] < max(found) * (1.0 - _LOG_TOLERANCE):
                continue
            answer = profile.answer(found[side])
            added = grid.added(law, replace(grid.goal.places[side], slope=max(answer.slope, 1e-300)))
            if not answer.inside or answer.lost + answer.slope * added > 10.0 * _LOG_TOLERANCE:
                return None
        return max(found)

    # -- lower bounds ------------------------------------------------------------------------------------------------

    def _below(
        self, counts: dict[Term, int], both: tuple[Law, ...], places: tuple[Place, ...], log_delta: float
    ) -> Grid | None:
        """Returns a grid of distributions that are rounded down."""
        if not places:
            return None
        return grid_for(counts, both, Goal(log_delta, places, self.tolerance, below=True))

    def _epsilon_below(
        self, counts: dict[Term, int], both: tuple[Law, ...], places: tuple[Place, ...], delta: float
    ) -> float:
        grid = self._below(counts, both, places, math.log(delta))
        profiles = grid.read(counts) if grid else None
        return max((profile.epsilon_below(delta) for profile in profiles or []), default=0.0)

    def _delta_below(
        self, counts: dict[Term, int], both: tuple[Law, ...], places: tuple[Place, ...], epsilon: float
    ) -> float:
        log_delta = max(law.log_delta(epsilon)[0] for law in both)
        grid = self._below(counts, both, places, min(log_delta, 0.0))
        profiles = grid.read(counts) if grid else None
        return max((profile.delta(epsilon) for profile in profiles or []), default=0.0)


def _tail(delta: float, counts: dict[Term, int], cut: float = CUTS[0]) -> float:
    """Returns the probability below which a loss of one step does not count for the sketch of the curve."""
    return max(delta * cut / sum(counts.values()), 1e-290)


def _least_epsilon(counts: dict[Term, int], delta: float, tilt: float) -> float:
    """Returns an ε that is needed at least, by moments of the whole composition in either direction.

    The moments of random allocation are of a law that is rounded up; without it the composition needs no more.
    """
    exact = {term: n for term, n in counts.items() if all(part.pair is not Pair.ALLOCATION for _, part in term.parts)}
    if not exact:
        return 0.0
    whole = laws(exact, _tail(delta, exact), sketch=False)
    return max(law.epsilon_below(delta, tilt) for law in whole)


def _least_delta(counts: dict[Term, int], epsilon: float, tilt: float, claimed: float) -> float:
    """Returns a number above `claimed` if moments prove that δ is larger, and 0 if they do not."""
    if not 0.0 < claimed < 1.0:
        return 0.0
    needed = max(_least_epsilon(counts, claimed, tilt), rarest_epsilon_below(counts, claimed))
    return math.nextafter(claimed * (1.0 + 1e-6), 2.0) if needed > epsilon * (1.0 + 1e-6) + 1e-9 else 0.0


def _about_delta(counts: dict[Term, int], epsilon: float) -> tuple[tuple[Law, ...], float]:
    """Returns the laws for δ at ε, and about log δ: what a single loss gives, or Chernoff where that is more.

    Which losses the laws leave out depends on δ, so that they are made twice.
    """
    both = laws(counts, _tail(1e-290, counts))
    log_delta = math.log(max(*(law.jump_delta(epsilon)[0] for law in both), 0.0, 1e-290))
    for _ in range(2):
        both = laws(counts, _tail(math.exp(log_delta), counts))
        log_delta = max(_log_delta_of(law, epsilon) for law in both)
    return laws(counts, _tail(math.exp(log_delta), counts)), log_delta


def _log_disclosed(counts: dict[Term, int]) -> float:
    """Returns log of about the probability that a record is drawn by a sampling that counts as full disclosure."""
    chance = math.fsum(
        count * weight * part.rate
        for term, count in counts.items()
        for weight, part in term.parts
        if part.pair is Pair.RARE
    )
    return math.log(min(chance, 1.0)) if chance > 0.0 else -math.inf


def _log_delta_of(law: Law, epsilon: float) -> float:
    jump, slope = law.jump_delta(epsilon)
    bound, tilt = law.log_delta(epsilon)
    if heavy_place(law, jump, epsilon, slope, tilt) is not None:
        return math.log(jump)
    # Chernoff's bound is above δ by about √2π times the tilt times the deviation.
    return min(0.0, bound - 2.5)


def _sketch(counts: dict[Term, int]) -> dict[Term, int]:
    """Returns the counts, or where there are many terms a sample of them with about as many steps."""
    if len(counts) <= _MANY:
        return counts
    sample = dict(list(counts.items())[:: -(-len(counts) // _SAMPLE)])
    share = sum(counts.values()) / sum(sample.values())
    return {term: max(1, round(count * share)) for term, count in sample.items()}


def _alike(grid: Grid, counts: dict[Term, int]) -> bool:
    """Whether the grid holds most of these terms, so that adding the others is quicker than starting anew."""
    missing = grid.missing(counts)
    return missing == 0 or (missing < len(counts) and missing <= max(2, len(counts) // 4))


def _counts(reduced: Reduced) -> dict[Term, int]:
    """Returns the terms with their counts in a fixed order, what was not sampled among them as a Gaussian of rate 1."""
    counts = dict(reduced.terms)
    if reduced.squared_mu > 0.0:
        gaussian = Term(((1.0, Part(Pair.MIXTURE, 1.0, 1.0 / math.sqrt(reduced.squared_mu))),))
        counts[gaussian] = counts.get(gaussian, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: _order(item[0])))


def _order(term: Term) -> tuple[tuple[float, str, float, float, int], ...]:
    return tuple((weight, p.pair.name, p.rate, p.noise_multiplier, p.group_size) for weight, p in term.parts)
