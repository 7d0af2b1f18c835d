"""The accounting oracle: an interval for δ at ε, and for ε at δ, that `privet` had no hand in.

    delta(event, epsilon, relation, group_size)   ->  Interval
    epsilon(event, delta, relation, group_size)   ->  Interval

`low` is reached by some data set (a claim below it is false); `high` is proven (a lower bound above it is false). Where
the pair is exact they differ by the error of the integral alone. Where an integral does not settle, what it stands for
is [0, 1], and `decided` is false.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import mpmath as mp
from oracle_contour import UndecidedError, one_direction
from oracle_laws import Symmetric
from oracle_reduction import NonPrivateError, ceilings, floors

from privet.accounting import Relation

__all__ = ["Interval", "delta", "delta_of", "epsilon"]


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    @property
    def decided(self) -> bool:
        return self.high <= self.low * (1.0 + 1e-3)


def delta(event, at, relation=Relation.ADD_OR_REMOVE_ONE, group_size=1) -> Interval:
    """Returns bounds on the least δ with which the event is (`at`, δ)-private."""
    try:
        reached = floors(event, relation, group_size)
        proven = ceilings(event, relation, group_size)
    except NonPrivateError:
        return Interval(1.0, 1.0)
    known = {each: delta_of(each, at) for each in {*reached, *proven}}
    low = max(known[each].low for each in reached)
    return Interval(low, max(low, min(known[each].high for each in proven)))


def delta_of(composition, at) -> Interval:
    """Returns bounds on δ of a composition: the larger of its two directions, each composed on its own."""
    both = dict.fromkeys((composition, composition.reversed()))  # one, where they are equal
    found = [_directed(each, at) for each in both]
    return Interval(max(low for low, _ in found), max(high for _, high in found))


def _directed(composition, at):
    if not composition.steps:
        return _widened(gaussian(composition.squared_mu**0.5, at))
    if composition.squared_mu == 0.0 and sum(count for _, count in composition.steps) == 1:
        ((single, _),) = composition.steps
        return _widened(sum(weight * one_step(part, at) for weight, part in single.parts))
    try:
        return one_direction(composition, at)
    except UndecidedError:
        return 0.0, 1.0


def _widened(value):
    return float(value) * (1.0 - 1e-12), float(value) * (1.0 + 1e-12)


def gaussian(mu, at):
    """Returns δ of N(μ, 1) against N(0, 1), at 60 digits (Balle and Wang, 1805.06530, theorem 8)."""
    with mp.workdps(60):
        if mu == 0.0:
            return mp.mpf(0)
        mu, at = mp.mpf(mu), mp.mpf(at)
        return mp.ncdf(mu / 2 - at / mu) - mp.exp(at) * mp.ncdf(-mu / 2 - at / mu)


def one_step(part, at):
    """Returns δ of one pair in closed form at 60 digits: P - e^ε Q where the loss is above ε, by bisection."""
    pair = part.mixture if isinstance(part, Symmetric) else part
    with mp.workdps(60):
        sigma, at = mp.mpf(pair.sigma), mp.mpf(at)
        crossings = _crossings(pair, sigma, at)
        total = mp.mpf(0)
        for low, high in crossings:
            for law, factor in ((pair.p, mp.mpf(1)), (pair.q, -mp.exp(at))):
                whole = mp.fsum(law.weights)
                for weight, shift in zip(law.weights, law.shifts, strict=True):
                    total += factor * mp.mpf(weight) / whole * _between((low - shift) / sigma, (high - shift) / sigma)
        return total


def _between(low, high):
    """Returns the mass of N(0, 1) between two ends, from tails on the nearer side."""
    return mp.ncdf(-low) - mp.ncdf(-high) if low > 0 else mp.ncdf(high) - mp.ncdf(low)


def _log_density(law, sigma, x):
    whole = mp.fsum(law.weights)
    return mp.log(
        mp.fsum(
            mp.mpf(weight) / whole * mp.exp(-((x - shift) ** 2) / (2 * sigma**2))
            for weight, shift in zip(law.weights, law.shifts, strict=True)
        )
    )


def _crossings(pair, sigma, at):
    """Returns the intervals of x on which the loss is above ε."""
    shifts = (*pair.p.shifts, *pair.q.shifts)
    excess = lambda x: _log_density(pair.p, sigma, x) - _log_density(pair.q, sigma, x) - at  # noqa: E731
    ends = min(shifts) - 40 * sigma, max(shifts) + 40 * sigma
    table = [ends[0] + (ends[1] - ends[0]) * mp.mpf(i) / 400 for i in range(401)]
    signs = [excess(x) > 0 for x in table]
    roots = [(-mp.inf, signs[0])]
    for left, right, before, after in zip(table, table[1:], signs, signs[1:], strict=False):
        if before != after:
            low, high = left, right
            for _ in range(120):
                middle = (low + high) / 2
                low, high = (middle, high) if (excess(middle) > 0) == before else (low, middle)
            roots.append((low, after))
    roots.append((mp.inf, False))
    return [(start, end) for (start, above), (end, _) in itertools.pairwise(roots) if above]


def epsilon(event, at, relation=Relation.ADD_OR_REMOVE_ONE, group_size=1, *, rounds=40) -> Interval:
    """Returns bounds on the least ε >= 0 with which the event is (ε, `at`)-private, by a search for the root of δ."""
    low = _root(lambda e: delta(event, e, relation, group_size).low, at, rounds)
    high = _root(lambda e: delta(event, e, relation, group_size).high, at, rounds)
    return Interval(low[0], high[1])


def _root(function, target, rounds):
    """Returns an interval (low, high) of ε in which a falling δ(ε) passes the target, by regula falsi on log δ."""
    if function(0.0) <= target:
        return 0.0, 0.0
    low, high = 0.0, 1.0
    while function(high) > target:
        low, high = high, 2.0 * high
        if high > 1e6:
            return low, math.inf
    for _ in range(rounds):
        if high - low <= 1e-6 * high:
            break
        middle = (
            math.sqrt(low * high) if low > 0.0 and high > 2.0 * low else (low + high) / 2.0 if low > 0.0 else high / 8.0
        )
        low, high = (middle, high) if function(middle) > target else (low, middle)
    return low, high
