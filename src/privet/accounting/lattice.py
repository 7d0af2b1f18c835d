"""Privacy loss distributions on a grid, never smaller than the truth: connect the dots.

Doroshenko, Ghazi, Kamath, Kumar and Manurangsi, arXiv 2207.04380, theorem 3.1: the mass of a cell moves to the two
ends of the cell so that both laws keep their mass. In e^loss that is a spread which preserves the mean, so δ of every
composition can only grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.accounting.pairs import Cells, cells
from privet.accounting.terms import Pair, Term

__all__ = ["Lattice", "lattices"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Lattice:
    """A loss distribution under P: `mass[i]` at loss (first + i) h, `infinity` at plus infinity.

    `variance[i]` is what the spread added to the loss's variance on the i-th cell, times its mass; `raised` is mass
    that was moved up from below the first loss. Both are only for the lower bound and the choice of the grid.
    """

    first: int
    mass: Array
    infinity: float
    variance: Array
    raised: float


def lattices(term: Term, step: float, tail: float) -> tuple[Lattice, Lattice | None]:
    """Returns the distributions of both directions of a term; the second is None where it is the same as the first."""
    forward, backward = [], []
    for weight, part in term.parts:
        table = cells(part, step, tail)
        if part.pair is Pair.SYMMETRIC:
            both = _symmetrised(table, step)
            found = (both, both)
        else:
            ahead = _spread(table, step)
            found = (ahead, ahead if part.pair is Pair.REPLACE else _spread(_exchanged(table), step))
        forward.append((weight, found[0]))
        backward.append((weight, found[1]))
    same = all(a is b for (_, a), (_, b) in zip(forward, backward, strict=True))
    return _mixed(forward), None if same else _mixed(backward)


def _exchanged(table: Cells) -> Cells:
    """Returns the cells of Q against P: losses change their sign."""
    count = len(table.p)
    losses_end = -(table.first + count)
    return Cells(
        first=losses_end,
        p=table.q[::-1],
        q=table.p[::-1],
        rounding=table.rounding[::-1],
        p_below=table.q_above,
        q_below=table.p_above,
        p_above=table.q_below,
        q_above=table.p_below,
    )


def _shares(p: Array, q: Array, rounding: Array, losses: Array, step: float) -> Array:
    """Returns how much of each cell's P goes to its upper end: (P - e^loss Q) / (1 - e^-h), losses at the lower end.

    Rounded up, toward the larger loss. Above e^650 all goes up, which needs no e^loss.
    """
    growth = np.exp(np.minimum(losses, 650.0))
    upper = (p - growth * q + 2.0 * rounding) / -math.expm1(-step)
    result: Array = np.where(losses > 650.0, p, np.clip(upper, 0.0, p))
    return result


def _spread(table: Cells, step: float) -> Lattice:
    """Returns the distribution of the loss under P, the dots connected."""
    losses = step * (table.first + np.arange(len(table.p), dtype=np.float64))
    upper = _shares(table.p, table.q, table.rounding, losses, step)
    mass = np.zeros(len(table.p) + 1)
    mass[:-1] = table.p - upper
    mass[1:] += upper
    # Losses below the first cell may still be above its lower end, where losses are bounded from below.
    mass[1] += table.p_below
    return Lattice(table.first, mass, table.p_above, _added(table.p, upper, step), table.p_below)


def _symmetrised(table: Cells, step: float) -> Lattice:
    """Returns the distribution whose profile is δ(ε) of the pair for ε >= 0 and 1 - e^ε + e^ε δ(-ε) below.

    Zhu, Dong and Wang, arXiv 2106.08567, theorem 11: of fixed-size sampling under replace-one. On positive losses it
    is P, on negative ones the mirrored Q, and what is left of the mass has loss 0.
    """
    count = len(table.p)
    losses = step * np.arange(count, dtype=np.float64)
    upper = _shares(table.p, table.q, table.rounding, losses, step)
    mass = np.zeros(2 * count + 1)
    mass[count:-1] += table.p - upper
    mass[count + 1 :] += upper
    # Mirrored: the mass is q, and its ends at -(i+1) h and -i h take it so that the other law keeps p.
    mirrored = _shares(table.q[::-1], table.p[::-1], table.rounding[::-1], -losses[::-1] - step, step)
    mass[:count] += table.q[::-1] - mirrored
    mass[1 : count + 1] += mirrored
    mass[0] += table.q_above
    rest = 1.0 - float(mass.sum()) - table.p_above
    mass[count] += max(rest, 0.0)
    variance = np.concatenate([_added(table.q[::-1], mirrored, step), _added(table.p, upper, step)])
    return Lattice(-count, mass, table.p_above, variance, table.q_above)


def _added(p: Array, upper: Array, step: float) -> Array:
    """Bounds the variance that the spread adds: h² u (1 - u) is concave in the place u, so its mean place bounds it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        added = np.where(p > 0.0, upper * (p - upper) / p, 0.0)
    return added * step**2 * (1.0 + step)


def _mixed(parts: list[tuple[float, Lattice]]) -> Lattice:
    """Returns the mixture of distributions whose label is seen: masses add."""
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    first = min(part.first for _, part in parts)
    size = max(part.first + len(part.mass) for _, part in parts) - first
    mass, variance = np.zeros(size), np.zeros(size - 1)
    for weight, part in parts:
        start = part.first - first
        mass[start : start + len(part.mass)] += weight * part.mass
        variance[start : start + len(part.variance)] += weight * part.variance
    return Lattice(
        first,
        mass,
        sum(weight * part.infinity for weight, part in parts),
        variance,
        sum(weight * part.raised for weight, part in parts),
    )
