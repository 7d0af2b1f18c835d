"""Dominating pairs of distributions on a grid of privacy losses.

Every pair here is two mixtures of Gaussians of one width, in the order that makes the loss log(P/Q) grow with x. A
cell holds what both laws put between two neighbouring grid losses. Backward the laws are exchanged and losses change
sign; each direction has the range of losses that its own first law needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.accounting import _special as special
from privet.accounting.terms import Pair, Part

__all__ = ["Cells", "Mixtures", "Range", "cells", "lumps", "mixtures", "negligible"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Cells:
    """What P and Q put on the losses from (first + i) h to (first + i + 1) h, and on the losses beyond both ends.

    `rounding` bounds the error of each entry of `p` and `q` alike.
    """

    first: int
    p: Array
    q: Array
    rounding: Array
    p_below: float
    q_below: float
    p_above: float
    q_above: float


@dataclass(frozen=True)
class Mixtures:
    """P and Q as weights and shifts of N(shift, σ²), with a loss that grows with x."""

    p_weights: Array
    p_shifts: Array
    q_weights: Array
    q_shifts: Array
    sigma: float

    def loss(self, x: Array) -> Array:
        """Returns log(P/Q) at x, without cancellation where it is small."""
        return self._log_tilt(x, self.p_weights, self.p_shifts) - self._log_tilt(x, self.q_weights, self.q_shifts)

    def _log_tilt(self, x: Array, weights: Array, shifts: Array) -> Array:
        if len(shifts) == 1:
            return np.asarray((2.0 * shifts[0] * x - shifts[0] ** 2) / (2.0 * self.sigma**2))
        exponents = (2.0 * shifts[:, None] * x - shifts[:, None] ** 2) / (2.0 * self.sigma**2)
        largest = np.maximum(exponents.max(axis=0), 0.0)
        small = largest < 30.0
        near = np.log1p(weights @ np.expm1(np.where(small, exponents, 0.0)))
        with np.errstate(divide="ignore"):
            far = largest + np.log(weights @ np.exp(exponents - largest))
        return np.where(small, near, far)

    def slope(self, x: Array) -> Array:
        """Returns the derivative of the loss: the difference of the mean shifts given x, over σ²."""
        return self._mean_shift(x, self.p_weights, self.p_shifts) - self._mean_shift(x, self.q_weights, self.q_shifts)

    def _mean_shift(self, x: Array, weights: Array, shifts: Array) -> Array:
        exponents = (2.0 * shifts[:, None] * x - shifts[:, None] ** 2) / (2.0 * self.sigma**2)
        parts = weights[:, None] * np.exp(exponents - exponents.max(axis=0))
        mean: Array = (shifts @ parts) / parts.sum(axis=0) / self.sigma**2
        return mean

    def reach(self, tail: float, *, p: bool = True, q: bool = True) -> tuple[float, float]:
        """Returns x below and above which none of the laws asked about has more than about `tail`."""
        weights = np.concatenate([self.p_weights[: None if p else 0], self.q_weights[: None if q else 0]])
        shifts = np.concatenate([self.p_shifts[: None if p else 0], self.q_shifts[: None if q else 0]])
        with np.errstate(divide="ignore"):
            z = -special.ndtri(np.minimum(0.5, tail / np.maximum(weights * len(self.p_weights), 1e-300)))
        used = weights > tail / (4.0 * len(weights))
        return float((shifts - self.sigma * z)[used].min()), float((shifts + self.sigma * z)[used].max())

    def inverse(self, losses: Array, low: float, high: float) -> Array:
        """Returns x at the given losses; for losses beyond those of `low` and `high`, possibly those two.

        Minus infinity where every loss is larger.
        """
        q = float(self.p_weights[-1])
        if len(self.p_weights) == 1:
            return np.asarray(self.sigma**2 * losses / self.p_shifts[0] + self.p_shifts[0] / 2.0, dtype=np.float64)
        if len(self.p_weights) == 2 and len(self.q_weights) == 1:
            with np.errstate(divide="ignore", over="ignore"):
                ratio = np.maximum(np.expm1(np.minimum(losses, 700.0)) / q, -1.0)
                x = self.sigma**2 * np.where(losses > 700.0, losses - math.log(q), np.log1p(ratio)) + 0.5
            return np.asarray(x, dtype=np.float64)
        # Newton from a fine table, kept inside the table's interval, which brackets the root.
        table = np.linspace(low, high, 8193)
        at_table = np.maximum.accumulate(self.loss(table))
        place = np.clip(np.searchsorted(at_table, losses), 1, len(table) - 1)
        x = np.interp(losses, at_table, table)
        for _ in range(5):
            slope = np.maximum(self.slope(x), 1e-300)
            x = np.clip(x - (self.loss(x) - losses) / slope, table[place - 1], table[place])
        return np.asarray(x, dtype=np.float64)


def mixtures(part: Part) -> Mixtures:
    """Returns the two laws of a part. SYMMETRIC is built from the MIXTURE at shift 2, which is σ/2."""
    q, sigma = part.rate, part.noise_multiplier
    none, one = np.array([1.0]), np.array([0.0])
    if part.pair is Pair.REPLACE:
        weights = np.array([1.0 - q, q])
        return Mixtures(weights, np.array([0.0, 1.0]), weights, np.array([0.0, -1.0]), sigma)
    if part.pair is Pair.GROUP:
        i = np.arange(part.group_size + 1.0)
        size = float(part.group_size)
        logs = special.log_binomial(size, i) + i * math.log(q)
        weights = np.exp(logs + (size - i) * math.log1p(-q))
        return Mixtures(weights / weights.sum(), i, none, one, sigma)
    if part.pair is Pair.SYMMETRIC:
        sigma /= 2.0
    if q == 1.0:
        return Mixtures(none, np.array([1.0]), none, one, sigma)
    return Mixtures(np.array([1.0 - q, q]), np.array([0.0, 1.0]), none, one, sigma)


@dataclass(frozen=True)
class Range:
    """Which losses are wanted, at least and at most. A bound that is a multiple of the spacing is kept exactly."""

    least: float = -math.inf
    most: float = math.inf


_ALL = Range()


def negligible(part: Part, tail: float, *, forward: bool, tilt: float) -> float:
    """Returns a loss below which the first law's mass weighs at most `tail` under the tilt, wherever there it lies."""
    pair = mixtures(part)
    low, high = pair.reach(tail, p=forward, q=not forward)
    x = np.linspace(low, high, 257)
    weights, shifts, sign = (pair.p_weights, pair.p_shifts, 1.0) if forward else (pair.q_weights, pair.q_shifts, -1.0)
    mass = weights @ special.ndtr(sign * (x - shifts[:, None]) / pair.sigma)
    losses = sign * pair.loss(x)
    with np.errstate(divide="ignore"):
        weighs = np.log(mass) + tilt * losses <= math.log(max(tail, 1e-300))
    return float(losses[weighs].max(initial=-math.inf))


def cells(part: Part, step: float, tail: float, *, forward: bool = True, within: Range = _ALL) -> Cells:
    """Returns the cells of one direction of a part on the grid of multiples of `step`, losses of that direction.

    At most `tail` of the first law lies beyond either end, unless `within` cuts the range there. SYMMETRIC needs both
    laws from loss 0 on, and has one direction.
    """
    pair = mixtures(part)
    symmetric = part.pair is Pair.SYMMETRIC
    low, high = pair.reach(tail, p=forward or symmetric, q=not forward or symmetric)
    sign = 1.0 if forward else -1.0
    ends = sorted(float(sign * end) for end in pair.loss(np.array([low, high])))
    ends = [max(ends[0], within.least), min(ends[1], within.most)]
    first = 0 if symmetric and within.least <= 0.0 else math.floor(ends[0] / step + 1e-9)
    last = max(math.ceil(ends[1] / step - 1e-9), first + 1)  # one cell even where no loss but one has any weight
    losses = step * np.arange(first, last + 1, dtype=np.float64)
    x = pair.inverse(sign * losses[:: int(sign)], low, high)
    p, p_rounding, p_below, p_above = _masses(x, pair.p_weights, pair.p_shifts, pair.sigma)
    q, q_rounding, q_below, q_above = _masses(x, pair.q_weights, pair.q_shifts, pair.sigma)
    if not forward:
        p, q, p_rounding, q_rounding = q[::-1], p[::-1], q_rounding[::-1], p_rounding[::-1]
        p_below, q_below, p_above, q_above = q_above, p_above, q_below, p_below
    return Cells(
        first,
        p,
        q,
        p_rounding + q_rounding * np.exp(np.minimum(losses[:-1], 650.0)),
        p_below,
        q_below,
        p_above,
        q_above,
    )


def _masses(x: Array, weights: Array, shifts: Array, sigma: float) -> tuple[Array, Array, float, float]:
    """Returns what a mixture puts between neighbouring x, the rounding error of that, and what lies beyond the ends.

    Differences are taken between upper tails on the right of a component's centre and lower tails on the left, so
    that the error is relative to the tail and not to 1.
    """
    mass, rounding = np.zeros(len(x) - 1), np.zeros(len(x) - 1)
    below = above = 0.0
    for weight, shift in zip(weights, shifts, strict=True):
        z = (x - shift) / sigma
        tail = special.ndtr(-np.abs(z))
        signed = np.where(z > 0.0, -tail, tail)  # increasing in z but for a jump from 1/2 to -1/2 at 0
        difference = np.diff(signed)
        crossing = (z[:-1] <= 0.0) & (z[1:] > 0.0)
        mass += weight * np.maximum(np.where(crossing, difference + 1.0, difference), 0.0)
        rounding += weight * 4e-16 * np.where(crossing, 1.0, np.maximum(tail[:-1], tail[1:]))
        below += weight * float(special.ndtr(z[0]))
        above += weight * float(special.ndtr(-z[-1]))
    return mass, rounding, below, above


def lumps(part: Part, step: float, tail: float, *, forward: bool) -> tuple[int, Array, float]:
    """Returns (first, masses, offset): P on outcomes merged around each grid loss, merged losses rounded down.

    An outcome that stands for all x between two bounds has the loss log(P/Q) of the two sums, which lies between those
    of its ends. Bounds lie half a cell on either side of each grid loss and move until the merged loss is just above
    the grid's; where it still is not, the mass goes one grid loss down. The grid itself is moved by `offset`, so that
    the heaviest outcome lies on it exactly: with rare losses nearly all mass is there, and rounding it down would cost
    a cell a step. Backward the laws are exchanged and losses change sign.
    """
    pair = mixtures(part)
    low, high = pair.reach(tail)
    ends = pair.loss(np.array([low, high]))
    first = math.floor(ends[0] / step)
    last = max(math.ceil(ends[1] / step), first + 1)
    losses = step * np.arange(first, last + 1, dtype=np.float64)
    sign = 1.0 if forward else -1.0
    halves = step * (np.arange(first, last + 2, dtype=np.float64) - 0.5)  # the lump of losses[k] is between k and k + 1
    moved, offset = np.zeros_like(halves), 0.0
    mass = above = np.zeros(0)
    for attempt in range(4):
        x = pair.inverse(np.maximum.accumulate(halves + offset + moved), low, high)
        p, p_rounding, _, _ = _masses(x, pair.p_weights, pair.p_shifts, pair.sigma)
        q, q_rounding, _, _ = _masses(x, pair.q_weights, pair.q_shifts, pair.sigma)
        if not forward:
            p, q, p_rounding, q_rounding = q, p, q_rounding, p_rounding
        mass = np.maximum(p - p_rounding, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            merged = np.where(mass > 0.0, np.log(mass / (q + q_rounding)), -np.inf)
        heaviest = int(mass.argmax())
        apart = float(merged[heaviest] - sign * (losses[heaviest] + offset))
        if math.isfinite(apart) and (attempt == 0 or (attempt == 3 and apart < 0.0)):
            offset += sign * min(max(apart, -step), step)
        above = merged - sign * (losses + offset)
        # Where the second law leaves the range of float64, the lump's own lower end is what is known of its loss.
        above = np.where((q < 1e-290) & (mass > 0.0), -0.6 * step, above)
        if attempt == 3:
            break
        short = np.where(np.isfinite(above), np.clip(-above, -step / 4.0, step / 4.0), 0.0)
        push = np.maximum(short[:-1], short[1:])
        moved[1:-1] += sign * (push + 1e-3 * np.abs(push) + 1e-9 * step)
    down = np.where(above >= 0.0, 0, np.where(above >= -step, 1, -1))
    index = np.arange(first, last + 1) if forward else -np.arange(first, last + 1)
    start = int(index.min()) - 1
    found = np.zeros(last - first + 2)
    kept = down >= 0
    np.add.at(found, index[kept] - down[kept] - start, mass[kept])
    return start, found, sign * offset
