"""Privacy loss distributions on a grid: never smaller than the truth (connect the dots), or never larger (lumps).

Doroshenko, Ghazi, Kamath, Kumar and Manurangsi, arXiv 2207.04380, theorem 3.1: the mass of a cell moves to the two
ends of the cell so that both laws keep their mass. In e^loss that is a spread which preserves the mean, so δ of every
composition can only grow.

The other side merges what lies around a grid loss into one outcome, and forgets which it was. Forgetting is processing,
so δ of every composition can only fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from privet.accounting.allocation import LossLaw, loss_law
from privet.accounting.pairs import Cells, Range, cells, lumps, negligible
from privet.accounting.terms import Pair, Part, Term

__all__ = ["Lattice", "lattice_above", "lattice_below", "rare_lattice", "usual_lattice"]

Array = NDArray[np.float64]
_ALL = Range()


@dataclass(frozen=True)
class Lattice:
    """A loss distribution under P: `mass[i]` at loss (first + i) h + offset, `infinity` at plus infinity.

    Only distributions that are rounded down have an offset. In the rare factor of a step (`rare_lattice`) `mass` is
    that of the rare losses alone, and there is none with probability `chance_of_none`.
    """

    first: int
    mass: Array
    infinity: float
    offset: float = 0.0
    chance_of_none: float = 0.0


def lattice_above(term: Term, step: float, tail: float, *, forward: bool, tilt: float = 0.0) -> Lattice:
    """Returns the distribution of one direction of a term, rounded up.

    At most `tail` counts as full disclosure. Losses so small that they do not count under the tilt, nor all of them
    together, are moved up.
    """
    return _of_parts(term, lambda part: _above(part, step, tail, forward=forward, tilt=tilt))


def lattice_below(term: Term, step: float, tail: float, *, forward: bool) -> Lattice:
    """Returns the distribution of one direction of a term, rounded down; mass that is left out counts as nothing."""
    return _of_parts(term, lambda part: _below(part, step, tail, forward=forward))


def usual_lattice(term: Term, step: float, tail: float, split: float, *, forward: bool) -> Lattice:
    """Returns the first factor of a step: its losses below `split`, made to sum to 1.

    A step is one draw of its usual and one of its rare factor, and their losses add. A step with a rare loss then draws
    a usual loss as well, which the step itself does not; with -log s added to each rare loss, s being the probability
    of the usual losses, that only makes δ larger: the usual law Y has E_P[e^-Y] <= 1/s, so by Jensen's inequality
    E(1 - e^(ε - X - Y + log s))+ >= (1 - e^(ε - X))+ for every X.
    """
    within = Range(most=split)
    found = _of_parts(term, lambda part: _above(part, step, tail, forward=forward, within=within))
    return replace(found, mass=found.mass / found.mass.sum(), infinity=0.0)


def rare_lattice(term: Term, step: float, tail: float, split: float, *, forward: bool) -> Lattice:
    """Returns the second factor of a step: its losses above `split`, and loss 0 with the probability of the others."""
    within = Range(least=split)
    found = _of_parts(term, lambda part: _above(part, step, tail, forward=forward, within=within), left=False)
    return _risen(found, step)


def _risen(rare: Lattice, step: float) -> Lattice:
    """Returns the rare factor with -log s added to its losses, the dots connected as everywhere."""
    chance = 1.0 - float(rare.mass.sum()) - rare.infinity
    rise = -math.log(chance) / step
    whole, share = int(rise), math.expm1(-step * (rise - int(rise))) / math.expm1(-step)
    mass = np.zeros(len(rare.mass) + 1)
    mass[:-1] = rare.mass * (1.0 - share)
    mass[1:] += rare.mass * share
    return Lattice(rare.first + whole, mass, rare.infinity, chance_of_none=chance)


def _of_parts(term: Term, lattice_of: Callable[[Part], Lattice], *, left: bool = True) -> Lattice:
    """Returns the mixture of the lattices of a term's parts, whose label is seen: masses add.

    With `left`, what no part covers has loss 0.
    """
    parts = [(weight, lattice_of(part)) for weight, part in term.parts]
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    first = min((0, *(part.first for _, part in parts))) - 1
    size = max((1, *(part.first + len(part.mass) for _, part in parts))) - first
    mass = np.zeros(size)
    for weight, part in parts:
        # Parts whose grids lie apart are brought to the common one by rounding down.
        start = part.first - first - (1 if part.offset < 0.0 else 0)
        mass[start : start + len(part.mass)] += weight * part.mass
    if left:
        mass[-first] += max(0.0, 1.0 - sum(weight for weight, _ in parts))
    return Lattice(first, mass, sum(weight * part.infinity for weight, part in parts))


def _above(part: Part, step: float, tail: float, *, forward: bool, within: Range = _ALL, tilt: float = 0.0) -> Lattice:
    if part.pair is Pair.RARE:
        # Whatever is wanted of it: it has no loss but 0 and infinity.
        return Lattice(0, np.array([1.0 - part.rate, 0.0]) * (within.least <= 0.0), part.rate)
    if part.pair is Pair.ALLOCATION:
        law = loss_law(part.noise_multiplier, part.steps, tail)
        return _of_law(law, step, tail, forward=forward, within=within)
    symmetric = part.pair is Pair.SYMMETRIC
    below = math.isinf(within.least)
    if below and not symmetric:
        within = replace(within, least=negligible(part, tail, forward=forward, tilt=tilt))
    if symmetric and below:
        table = cells(part, step, tail)
        lattice = _symmetrised(table, step, within.most)
    else:
        table = cells(part, step, tail, forward=forward, within=within)
        lattice = _spread(table, step, below=below, above=math.isinf(within.most))
    return lattice if math.isinf(within.most) else _topped(lattice, table, round(within.most / step))


def _of_law(law: LossLaw, step: float, tail: float, *, forward: bool, within: Range) -> Lattice:
    """Returns the distribution of a law of single losses, each spread over the two grid losses around it."""
    losses = (law.losses if forward else -law.losses[::-1]) + law.slack
    mass = law.with_record if forward else law.mass[::-1]
    infinity = law.infinite if forward else law.zero
    # What has a loss that does not count is moved up.
    start = int(np.searchsorted(np.cumsum(mass), tail)) if math.isinf(within.least) else 0
    losses = np.maximum(losses, losses[min(start, len(losses) - 1)])
    whole = np.floor(losses / step)
    if not math.isinf(within.least):
        kept = whole >= round(within.least / step)
        losses, mass, whole = losses[kept], mass[kept], whole[kept]
    if not math.isinf(within.most):
        kept = whole < round(within.most / step)
        losses, mass, whole, infinity = losses[kept], mass[kept], whole[kept], 0.0
    if not len(losses):
        return Lattice(max(0, round(within.least / step)) if math.isfinite(within.least) else 0, np.zeros(2), infinity)
    share = np.clip(np.expm1(step * whole - losses) / math.expm1(-step), 0.0, 1.0)
    first = int(whole[0])
    index = whole.astype(np.int64) - first
    length = int(index[-1]) + 2
    spread = np.zeros(length)
    spread += np.bincount(index, mass * (1.0 - share), length)
    spread += np.bincount(index + 1, mass * share, length)
    return Lattice(first, spread, infinity)


def _topped(lattice: Lattice, table: Cells, most: int) -> Lattice:
    """Returns the lattice with what lies above the cells put at the grid loss `most`, if the cells end below it.

    The range of a term ends where little of it is left. Where that is below the loss at which its range was to be cut,
    what is left must not be lost between the two.
    """
    if table.first + len(table.p) >= most:
        return lattice
    mass = np.zeros(most - lattice.first + 1)
    mass[: len(lattice.mass)] = lattice.mass[: len(mass)]
    mass[-1] += table.p_above
    return replace(lattice, mass=mass)


def _below(part: Part, step: float, tail: float, *, forward: bool) -> Lattice:
    # Pairs that no two data sets attain (`Reduced.tight`) have no lower bound.
    assert part.pair not in {Pair.RARE, Pair.SYMMETRIC}
    if part.pair is Pair.ALLOCATION:
        return Lattice(0, np.array([1.0, 0.0]), 0.0)  # as if it released nothing
    first, mass, offset = lumps(part, step, tail, forward=forward)
    return Lattice(first, mass, 0.0, offset)


def _shares(p: Array, q: Array, rounding: Array, losses: Array, step: float) -> Array:
    """Returns how much of each cell's P goes to its upper end: (P - e^loss Q) / (1 - e^-h), losses at the lower end.

    Rounded up, toward the larger loss. Above e^650 all goes up, which needs no e^loss.
    """
    growth = np.exp(np.minimum(losses, 650.0))
    upper = (p - growth * q + 2.0 * rounding) / -math.expm1(-step)
    result: Array = np.where(losses > 650.0, p, np.clip(upper, 0.0, p))
    return result


def _spread(table: Cells, step: float, *, below: bool = True, above: bool = True) -> Lattice:
    """Returns the distribution of the loss under P, the dots connected, with what lies below and above the cells."""
    losses = step * (table.first + np.arange(len(table.p), dtype=np.float64))
    upper = _shares(table.p, table.q, table.rounding, losses, step)
    mass = np.zeros(len(table.p) + 1)
    mass[:-1] = table.p - upper
    mass[1:] += upper
    if below:
        # Losses below the first cell may still be above its lower end, where losses are bounded from below.
        mass[min(1, len(mass) - 1)] += table.p_below
    return Lattice(table.first, mass, table.p_above if above else 0.0)


def _symmetrised(table: Cells, step: float, most: float = math.inf) -> Lattice:
    """Returns the distribution whose profile is δ(ε) of the pair for ε >= 0 and 1 - e^ε + e^ε δ(-ε) below.

    Zhu, Dong and Wang, arXiv 2106.08567, theorem 11: of fixed-size sampling under replace-one. On positive losses it
    is P, on negative ones the mirrored Q, and what is left of the mass has loss 0. Losses above `most` are left out.
    """
    count = len(table.p)
    losses = step * np.arange(count, dtype=np.float64)
    upper = _shares(table.p, table.q, table.rounding, losses, step)
    # Mirrored: the mass is q, and its ends at -(i+1) h and -i h take it so that the other law keeps p.
    mirrored = _shares(table.q[::-1], table.p[::-1], table.rounding[::-1], -losses[::-1] - step, step)
    mass = np.zeros(2 * count + 1)
    mass[:count] += table.q[::-1] - mirrored
    mass[1 : count + 1] += mirrored
    mass[0] += table.q_above
    mass[count] += max(1.0 - float(mass.sum()) - float(table.p.sum()) - table.p_above, 0.0)
    kept = count if math.isinf(most) else min(count, round(most / step))
    mass[count : count + kept] += (table.p - upper)[:kept]
    mass[count + 1 : count + kept + 1] += upper[:kept]
    return Lattice(-count, mass, table.p_above if math.isinf(most) else 0.0)
