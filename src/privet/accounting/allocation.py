"""What random allocation tells of a record: the law of its likelihood ratio, never less spread than the truth.

A record is in one of t steps, each as likely as the others. With the noisy sums y under the data without the record,
the likelihood ratio is the mean X of t independent lognormal numbers w_j = e^((2 y_j - 1) / 2σ²), each of mean 1. Both
directions follow from the law of X alone: δ(ε) is E(X - e^ε)+ for the record's removal, and E(1 - e^ε X)+ for its
addition. Both are means of convex functions. So a law that is more spread out and has the same mean bounds both, and
spreading commutes with adding independent numbers.

    w_j on a grid           what lies between two grid points goes to these two, so that the mean is kept
    a sum of two laws       the sum of two grid points goes to the two grid points around it, in the same way
    t of them               by doubling
    above the grid          disclosure: mass at 0, and what it takes from the mean at infinity
    below the grid          to 0 and to the least grid point, so that the mean is kept

Grid points are e^(i h) at first, so that a sum of two lies at a place that depends on their distance alone, and the
heavy tail of a lognormal number fits. Sums of many have a narrow law: their grid points are i h, where a sum of two is
a grid point itself. All terms are positive: nothing cancels, and a small δ keeps its digits.

Feldman and Shenfeld, arXiv 2502.08202 and 2602.17284; Chua et al., arXiv 2412.16802, theorem on the dominating pair.
Convex order: Shaked and Shanthikumar, Stochastic Orders, 2007, theorems 3.A.1 and 3.A.12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privet.accounting.pairs import Range, cells
from privet.accounting.terms import Pair, Part
from privet.errors import AccountingError

__all__ = ["LossLaw", "loss_law"]

Array = NDArray[np.float64]
_FINENESS = 1.0 / 64.0  # of a grid, relative to the deviation of the log of what lies on it
_MOST_POINTS = 6000.0
_WIDEST = 0.05  # step of a geometric grid
_LEAST_BOTTOM = 1e-8  # of the probability below the grid
_ROUNDING = 1e-10  # what floating point may have moved, relative; the tests see a thousandth of it
_KEPT_LAWS = 64


@dataclass(frozen=True)
class _Sum:
    """The law of a sum of `terms` of the numbers: `mass[i]` at a grid point, `zero` at 0, `lost` of its mean at ∞.

    Grid point i is e^((first + i) step) on a geometric grid, and (first + i) step on an even one.
    """

    terms: int
    geometric: bool
    step: float
    first: int
    mass: Array
    zero: float
    lost: float

    @property
    def points(self) -> Array:
        """The grid points."""
        places = self.step * (self.first + np.arange(len(self.mass), dtype=np.float64))
        return np.exp(places) if self.geometric else places


@dataclass(frozen=True)
class LossLaw:
    """The loss log X and its law without the record: `mass` at `losses`, `zero` at minus infinity.

    The law with the record is mass e^loss, and `infinite` at plus infinity. `slack` is to be added to every loss in
    either direction.
    """

    losses: Array
    mass: Array
    zero: float
    infinite: float
    slack: float = _ROUNDING

    @property
    def with_record(self) -> Array:
        """The law with the record at `losses`."""
        return self.mass * np.exp(self.losses)


def loss_law(noise_multiplier: float, steps: int, tail: float) -> LossLaw:
    """Returns the law of the loss of one pass of `steps` steps; about `tail` counts as disclosure in each direction.

    Raises:
        AccountingError: if the law that was found does not keep its mass or its mean.
    """
    # Few different tails, so that a law serves many questions.
    exponent = min(math.floor(math.log10(max(tail, 1e-280)) / 6.0) * 6, -12)
    return _loss_law(noise_multiplier, steps, 10.0**exponent)


@lru_cache(maxsize=_KEPT_LAWS)
def _loss_law(noise_multiplier: float, steps: int, tail: float) -> LossLaw:
    share = tail / (2 * steps.bit_length() + 1)
    one = _single(noise_multiplier, steps, share)
    total = one
    for bit in bin(steps)[3:]:
        total = _narrowed(_added(total, total), steps, share)
        if bit == "1":
            total = _narrowed(_added(total, _on_grid(one, geometric=total.geometric, step=total.step)), steps, share)
    losses = np.log(total.points / steps)
    law = LossLaw(losses, total.mass, total.zero, total.lost / steps)
    mass = float(law.mass.sum()) + law.zero
    mean = float(law.with_record.sum()) + law.infinite
    if not (abs(mass - 1.0) < _ROUNDING and abs(mean - 1.0) < _ROUNDING):
        raise AccountingError(
            f"the law of random allocation with σ = {noise_multiplier:g} and {steps} steps has mass {mass!r} and mean "
            f"{mean!r}. Expected 1 for both. Please report this, it is a bug."
        )
    # What rounding may have taken is given back: masses can only be too large.
    return replace(law, mass=law.mass * (1.0 + _ROUNDING))


def _single(noise_multiplier: float, steps: int, tail: float) -> _Sum:
    """Returns the law of one number."""
    bottom = _bottom(tail, 1, steps)
    low = -0.5 / noise_multiplier**2 - _quantile(bottom) / noise_multiplier
    high = 0.5 / noise_multiplier**2 + _quantile(tail) / noise_multiplier
    step = min(max(_FINENESS / noise_multiplier, (high - low) / _MOST_POINTS), _WIDEST)
    # Its log is the loss of the Gaussian mechanism.
    part = Part(Pair.MIXTURE, 1.0, noise_multiplier)
    table = cells(part, step, min(tail, bottom), within=Range(low, high))
    points = np.exp(step * (table.first + np.arange(len(table.p) + 1, dtype=np.float64)))
    # Shares of a cell from a to b that keep mass and mean: to the upper end (p - a q) / (b - a).
    upper = np.clip((table.p / points[:-1] - table.q) / math.expm1(step), 0.0, table.q)
    mass = np.zeros(len(points))
    mass[:-1] += table.q - upper
    mass[1:] += upper
    mass[0] += min(table.p_below / float(points[0]), table.q_below)
    # Rounding has moved mass and mean by some units.
    zero = max(1.0 - float(mass.sum()), table.q_above)
    lost = max(1.0 - float(mass @ points), table.p_above)
    return _Sum(1, True, step, table.first, mass, zero, lost)


def _quantile(tail: float) -> float:
    """Returns how many deviations lie beyond what a normal law has at most `tail` above."""
    return math.sqrt(max(-2.0 * math.log(min(2.0 * tail, 1.0)), 0.25))


def _bottom(tail: float, terms: int, steps: int) -> float:
    """Returns the probability that may go to 0 at `terms`: all of the steps at 0 is disclosure to the other side."""
    return min(_LEAST_BOTTOM, float(0.1 * tail ** (terms / steps)))


def _added(one: _Sum, other: _Sum) -> _Sum:
    """Returns the law of the sum of two independent numbers on one grid."""
    zero, lost, terms = one.zero * other.zero, one.lost + other.lost, one.terms + other.terms
    first = min(one.first, other.first)
    length = max(one.first + len(one.mass), other.first + len(other.mass)) - first
    a, b = (np.pad(each.mass, (each.first - first, 0)) for each in (one, other))
    a, b = (np.pad(each, (0, length - len(each))) for each in (a, b))
    if one.geometric:
        found = _geometric_sums(a, b, one.step, same=one is other)
    else:
        # From index `first` on, those of a number and 0 included, which only the other law knows.
        found = np.zeros(first + 2 * length)
        found[first : first + 2 * length - 1] = np.convolve(a, b)
    found[:length] += one.zero * b + other.zero * a
    return _Sum(terms, one.geometric, one.step, first, found, zero, lost)


def _geometric_sums(a: Array, b: Array, step: float, *, same: bool) -> Array:
    """Returns the law of the sum of two numbers other than 0, from the same first grid point on."""
    length = len(a)
    rises = 1 + int(math.log(2.0) / step)
    found = np.zeros(length + rises + 1)
    # Beyond `near` the smaller number moves the larger one by less than a step.
    near = min(length, 1 + max(0, math.ceil(-math.log(math.expm1(step)) / step)))
    rise = np.log1p(np.exp(-step * np.arange(near, dtype=np.float64)))
    whole = np.minimum(np.floor(rise / step), rises).astype(np.int64)
    share = np.clip(np.expm1(rise - step * whole) / math.expm1(step), 0.0, 1.0)
    for d in range(near):
        both = a[d:] * b[: length - d]
        if d and same:
            both *= 2.0
        elif d:
            both += b[d:] * a[: length - d]
        up = both * share[d]
        start = d + int(whole[d])
        found[start + 1 : start + 1 + len(both)] += up
        both -= up
        found[start : start + len(both)] += both
    for large, small in ((a, b), (b, a)):
        _add_far(found, large, small, near, step)
    return found


def _add_far(found: Array, large: Array, small: Array, near: int, step: float) -> None:
    """Adds the pairs at a distance of `near` grid points or more, all of them at once for each larger number."""
    length = len(large)
    if near >= length:
        return
    places = step * np.arange(length, dtype=np.float64)
    below = np.cumsum(small)[: length - near]
    # Σ of small e^(its log - that of the large one), over what lies far enough below.
    weight = np.cumsum(small * np.exp(places - places[-1]))[: length - near] * np.exp(places[-1] - places[near:])
    chosen = large[near:]
    up = chosen * np.minimum(weight / math.expm1(step), below)
    found[near:length] += chosen * below - up
    found[near + 1 : length + 1] += up


def _narrowed(law: _Sum, steps: int, tail: float) -> _Sum:
    """Returns the law on the points that matter, on a grid that suits its deviation."""
    points = law.points
    values = law.mass * points / law.terms  # the law with the record
    from_top = np.cumsum(values[::-1])[::-1]
    stop = max(int(np.searchsorted(-from_top, -tail)), 1)  # from here on it is at most `tail`, and cut
    from_bottom = np.cumsum(law.mass)
    start = min(int(np.searchsorted(from_bottom, _bottom(tail, law.terms, steps))), stop - 1)
    mass = law.mass[start:stop].copy()
    low = float(law.mass[:start] @ points[:start]) / float(points[start]) if start else 0.0
    mass[0] += low
    zero = law.zero + float(law.mass[:start].sum()) - low + float(law.mass[stop:].sum())
    lost = law.lost + law.terms * float(values[stop:].sum())
    law = replace(law, first=law.first + start, mass=mass, zero=zero, lost=lost)
    geometric, step = _grid_for(law)
    finer, coarser = step < law.step, not geometric and step >= 2.0 * law.step
    return _on_grid(law, geometric=geometric, step=step) if geometric != law.geometric or finer or coarser else law


def _grid_for(law: _Sum) -> tuple[bool, float]:
    """Returns whether a grid for the law is geometric, and its step."""
    points = law.points
    logs = np.log(points)
    deviations, middle = [], 0.0
    for weights in (law.mass * points / points[-1], law.mass):
        share = weights / weights.sum()
        middle = float(share @ logs)
        deviations.append(math.sqrt(float(share @ (logs - middle) ** 2)))
    fine = _FINENESS * min(deviations)
    even = fine * math.exp(middle)
    if not law.geometric or float(points[-1] - points[0]) < _MOST_POINTS * even:
        return False, max(even, float(points[-1] - points[0]) / _MOST_POINTS)
    return True, min(max(fine, float(logs[-1] - logs[0]) / _MOST_POINTS), _WIDEST)


def _on_grid(law: _Sum, *, geometric: bool, step: float) -> _Sum:
    """Returns the law on another grid, spread out so that its mass and mean are kept."""
    places = (np.log(law.points) if geometric else law.points) / step
    whole = np.floor(places)
    share = places - whole
    if geometric:
        share = np.clip(np.expm1(step * share) / math.expm1(step), 0.0, 1.0)
    first = int(whole[0])
    index = whole.astype(np.int64) - first
    length = int(index[-1]) + 2
    mass = np.zeros(length)
    mass += np.bincount(index, law.mass * (1.0 - share), length)
    mass += np.bincount(index + 1, law.mass * share, length)
    zero = law.zero
    if not geometric and first == 0:
        zero, first, mass = zero + float(mass[0]), 1, mass[1:]
    return replace(law, geometric=geometric, step=step, first=first, mass=mass, zero=zero)
