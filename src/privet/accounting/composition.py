"""Composition of loss distributions by Fourier transform, tilted so that small δ keeps its digits.

The mass at loss ℓ is multiplied by e^(λℓ - K(λ)) before it is transformed, and δ is read off the composed mass with
the tilt undone. Rounding and wrap-around are then relative to the part of the distribution that δ depends on, not to
its bulk: with λ at the saddle point of the δ in question, δ = 1e-30 is as well determined as δ = 1e-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privet.accounting.lattice import Lattice

__all__ = [
    "Composition",
    "Frame",
    "Profile",
    "Spectrum",
    "Tail",
    "Window",
    "good_size",
    "spectrum_of",
    "tail_of",
    "window_for",
]

Array = NDArray[np.float64]
_UNIT = 2.0**-53
_WRAPPED = 27.0  # log of how much of the tilted mass the window may lose on each side: e^-27 is 2e-12


@dataclass(frozen=True)
class Tail:
    """A distribution boiled down to some hundred bins, for bounds on its cumulants and for nothing else."""

    losses: Array
    mass: Array
    widths: Array
    log_scale: float
    mean: float
    variance: float
    added: float

    def cumulant(self, s: float) -> float:
        """Returns a bound on log E[e^(s(ℓ - mean))] under the tilt: Hoeffding's lemma covers what a bin hides."""
        exponents = s * (self.losses - self.mean) + (s * self.widths) ** 2 / 8.0
        largest = float(exponents.max())
        return largest + math.log(float(self.mass @ np.exp(exponents - largest)))


@lru_cache(maxsize=64)
def _bin_offsets(bits: int) -> NDArray[np.int64]:
    """Returns distances from the mode at which bins start: every grid loss at first, 3 % apart later."""
    wide = np.round(48.0 * 1.03 ** np.arange(24.0 * max(bits - 5, 1)))
    return np.unique(np.concatenate([np.arange(48.0), wide])).astype(np.int64)


def tail_of(lattice: Lattice, step: float, tilt: float) -> Tail:
    """Returns the bins: single grid losses around the mode, wider ones further out, never beyond the tilted mean."""
    losses = step * (lattice.first + np.arange(len(lattice.mass), dtype=np.float64))
    with np.errstate(divide="ignore"):
        logs = np.log(lattice.mass) + tilt * losses
    largest = float(logs.max())
    tilted = np.exp(logs - largest)
    total = float(tilted.sum())
    tilted /= total
    mode = int(tilted.argmax())
    reach = len(tilted)
    offsets = _bin_offsets(reach.bit_length())
    starts = np.concatenate([[0], (mode - offsets[::-1])[:-1], mode + offsets])
    starts = starts[np.searchsorted(starts, 0) : np.searchsorted(starts, reach)]
    if starts[0] != 0:
        starts = np.concatenate([[0], starts])
    mass = np.add.reduceat(tilted, starts)
    used = mass > 0.0
    means = np.add.reduceat(tilted * losses, starts)[used] / mass[used]
    widths = step * (np.diff(np.append(starts, reach)) - 1)[used]
    mean = float(mass[used] @ means)
    variance = float(mass[used] @ ((means - mean) ** 2 + widths**2 / 12.0))
    with np.errstate(divide="ignore"):
        added = np.exp(np.log(lattice.variance) + tilt * losses[1:] - largest).sum() / total
    return Tail(means, mass[used], widths, largest + math.log(total), mean, variance, float(added))


@dataclass(frozen=True)
class Spectrum:
    """The transform of one tilted distribution in polar form, shifted by `centre` grid steps to lie around zero."""

    log_amplitude: Array
    angle: Array
    centre: int


def spectrum_of(lattice: Lattice, tail: Tail, step: float, tilt: float, size: int) -> Spectrum:
    """Returns the spectrum on a circle of `size` grid losses."""
    losses = step * (lattice.first + np.arange(len(lattice.mass), dtype=np.float64))
    with np.errstate(divide="ignore"):
        tilted = lattice.mass * np.exp(np.minimum(tilt * losses - tail.log_scale, 700.0))
    if not np.isfinite(tilted).all() or abs(float(tilted.sum()) - 1.0) > 1e-6:
        with np.errstate(divide="ignore"):
            tilted = np.exp(np.log(lattice.mass) + tilt * losses - tail.log_scale)
    centre = round(tail.mean / step)
    start = (lattice.first - centre) % size
    padded = np.zeros(-(-(start + len(tilted)) // size) * size)
    padded[start : start + len(tilted)] = tilted
    transform = np.fft.rfft(padded.reshape(-1, size).sum(axis=0))
    amplitude = np.abs(transform)
    log_amplitude = np.log(np.maximum(amplitude, 1e-300))
    return Spectrum(log_amplitude, np.arctan2(transform.imag, transform.real), centre)


def good_size(least: int) -> int:
    """Returns a number of at least `least` whose transform is quick: even, with no factor above 5."""
    best = 1 << max(least - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            quotient = -(-least // three)
            candidate = three << max(max(quotient - 1, 0).bit_length(), 1)
            best = min(best, candidate) if candidate >= least else best
            three *= 3
        five *= 5
    return best


@dataclass(frozen=True)
class Window:
    """Which losses the circle stands for, and what may lie above them under the tilt (log)."""

    low: int
    size: int
    log_above: float


def window_for(tails: list[tuple[Tail, int]], step: float) -> Window:
    """Returns the window outside which the tilted composition has at most e^-27 on each side, by Chernoff's bound."""
    variance = sum(count * tail.variance for tail, count in tails) + 1e-300
    # Spectra are shifted by the rounded mean, so that what is left of it is the window's middle.
    drift = sum(count * (tail.mean - round(tail.mean / step) * step) for tail, count in tails)
    ideal = math.sqrt(2.0 * _WRAPPED / variance)
    ends = []
    for side in (1.0, -1.0):
        best = math.inf
        for factor in (0.06, 0.2, 0.5, 1.0):
            s = side * ideal * factor
            cumulant = sum(count * tail.cumulant(s) for tail, count in tails)
            best = min(best, (cumulant + _WRAPPED) / abs(s))
        ends.append(best)
    low = math.floor((drift - ends[1]) / step) - 2
    high = math.ceil((drift + ends[0]) / step) + 2
    return Window(low, high - low + 1, -_WRAPPED)


class Composition:
    """The composition of one direction: counts of each distribution, and from them δ at every ε.

    Every number it gives is rounded toward less privacy by the error that it knows of: mass at infinity, mass beyond
    the window, rounding of the transforms.
    """

    def __init__(self, *, size: int) -> None:
        self.size = size
        self._log_amplitude = np.zeros(size // 2 + 1)
        self._angle = np.zeros(size // 2 + 1)
        self.shift, self.steps = 0, 0

    def add(self, spectrum: Spectrum, count: int) -> None:
        """Composes `count` more (or, if negative, fewer) of a distribution."""
        self._log_amplitude += count * spectrum.log_amplitude
        self._angle += count * spectrum.angle
        self.shift += count * spectrum.centre
        self.steps += count

    def masses(self, window: Window) -> tuple[Array, float]:
        """Returns the tilted mass at each loss of the window, and what rounding may have moved at any of them."""
        log_amplitude = self._log_amplitude
        # Frequencies below e^-60 are far under the rounding; most are, since a composition is smooth.
        used = int(np.flatnonzero(log_amplitude > -60.0)[-1]) + 1
        amplitude = np.exp(log_amplitude[:used])
        transform = np.zeros(len(log_amplitude), dtype=np.complex128)
        transform.real[:used] = amplitude * np.cos(self._angle[:used])
        transform.imag[:used] = amplitude * np.sin(self._angle[:used])
        mass = np.fft.irfft(transform, self.size)
        mean_amplitude = float(2.0 * amplitude.sum() - amplitude[0]) / self.size + math.exp(-60.0)
        rounding = 4.0 * _UNIT * math.log2(self.size) * (1.0 + self.steps) * mean_amplitude + math.exp(-60.0)
        turn = (window.low - self.shift) % self.size
        return np.concatenate([mass[turn:], mass[:turn]]), rounding


class Frame:
    """A window's positive losses and the weights that undo the tilt there: what outlives a question."""

    def __init__(self, window: Window, *, step: float, tilt: float, reference: float) -> None:
        self.window, self.tilt, self.reference = window, tilt, reference
        # Only positive losses matter for ε >= 0; those so far below the reference that weights overflow set the floor.
        self.floor = max(0.0, reference - 600.0 / (tilt + 1.0))
        self.skip = min(max(0, math.ceil(self.floor / step) - window.low), window.size - 1)
        self.losses = step * (window.low + self.skip + np.arange(window.size - self.skip, dtype=np.float64))
        self.top = step * (window.low + window.size - 1)
        distance = self.losses - reference
        # A window that lies below the floor as a whole has no loss that counts.
        self.weights = np.where(self.losses < self.floor, 0.0, np.exp(np.clip(-tilt * distance, -745.0, 690.0)))
        self.rising = np.exp(np.clip(distance, -690.0, 690.0))
        self.falling = 1.0 / self.rising


class Profile:
    """δ(ε) of one composed direction."""

    def __init__(self, frame: Frame, mass: Array, rounding: float, *, log_scale: float, infinity: float) -> None:
        self._frame, self._losses, self._floor = frame, frame.losses, frame.floor
        self._log_scale = log_scale - frame.tilt * frame.reference
        self._infinity = infinity
        self._mass, self._rounding = mass[frame.skip :], rounding
        self._upper = frame.weights * (np.maximum(self._mass, 0.0) + rounding)

    @property
    def _lower(self) -> Array:
        return self._frame.weights * np.maximum(self._mass - self._rounding, 0.0)

    def delta(self, epsilon: float) -> float:
        """Returns an upper bound on δ at ε."""
        if epsilon < self._floor:
            return 1.0
        return min(1.0, self._beyond(epsilon) + self._at(epsilon, self._upper) * (1.0 + 1e-12))

    def _beyond(self, epsilon: float) -> float:
        """Returns what losses outside the window may add at ε: tilted, they weigh at most as at the top, or at ε."""
        frame = self._frame
        log_weight = self._log_scale - frame.tilt * (max(frame.top, epsilon) - frame.reference)
        return self._infinity + math.exp(min(log_weight + frame.window.log_above, 0.0))

    def delta_below(self, epsilon: float) -> float:
        """Returns δ at ε of the composed grid distribution, rounded down: what lies beyond is left out."""
        return self._at(epsilon, self._lower) * (1.0 - 1e-12) if epsilon >= self._floor else 0.0

    def _at(self, epsilon: float, weighted: Array) -> float:
        k = int(np.searchsorted(self._losses, epsilon, side="right"))
        value = float(weighted[k:] @ -np.expm1(epsilon - self._losses[k:]))
        return math.exp(min(self._log_scale + math.log(value), 0.0)) if value > 0.0 else 0.0

    def epsilon(self, delta: float) -> float:
        """Returns an upper bound on the smallest ε >= 0 with at most δ; infinity if more than δ is at infinity."""
        if delta <= self._infinity:
            return math.inf
        inside = self._solve(delta - self._beyond(0.0), self._upper, 1e-13)
        # Above the window only what lies beyond it counts, and that falls like e^-λε.
        frame = self._frame
        needed = self._log_scale + frame.window.log_above - math.log(delta - self._infinity)
        above = max(frame.top, self._floor, frame.reference + needed / frame.tilt)
        return min(inside, above) * (1.0 + 1e-12)

    def epsilon_below(self, delta: float) -> float:
        """Returns a lower bound on the smallest ε >= 0 at which the composed grid distribution has at most δ."""
        return self._solve(delta, self._lower, -1e-13) * (1.0 - 1e-12)

    def _solve(self, delta: float, weighted: Array, slack: float) -> float:
        """δ at ε between two losses is A - e^ε B with sums over the losses above: find the cell, then solve for ε."""
        if delta <= 0.0:
            return math.inf
        target = math.exp(min(math.log(delta) - self._log_scale, 690.0))
        sums, falling = _sums(weighted) * (1.0 + slack), _sums(weighted * self._frame.falling)
        at_losses = sums - self._frame.rising * falling
        k = int(np.argmax(at_losses <= target))
        if at_losses[k] > target:
            return math.inf
        excess = float(sums[k]) - target
        epsilon = self._frame.reference + math.log(excess / float(falling[k])) if excess > 0.0 else -math.inf
        before = float(self._losses[k - 1]) if k > 0 else -math.inf
        return max(self._floor, min(max(epsilon, before), float(self._losses[k])))


def _sums(values: Array) -> Array:
    """Returns the sum from each entry to the last."""
    result: Array = np.cumsum(values[::-1])[::-1]
    return result
