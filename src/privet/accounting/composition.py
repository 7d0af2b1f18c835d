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
    "WRAPPED",
    "Composition",
    "Spectrum",
    "Tail",
    "Window",
    "good_size",
    "spectrum_of",
    "tail_of",
    "window_for",
]

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
_UNIT = 2.0**-53
WRAPPED = 27.0  # -log of how much of the tilted mass a window may lose on each side: e^-27 is 2e-12


@dataclass(frozen=True)
class Tail:
    """A distribution boiled down to some hundred bins, for bounds on its cumulants and for nothing else."""

    losses: Array
    mass: Array
    widths: Array
    log_scale: float
    mean: float
    variance: float
    centre: int  # the grid loss that the spectrum is shifted by

    def log_moment(self, s: float) -> float:
        """Returns a bound on log of the sum of mass e^(sℓ), with the mass that the tilt was applied to."""
        return self.log_scale + s * self.mean + self.cumulant(s)

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
    losses, masses = step * (lattice.first + np.arange(len(lattice.mass), dtype=np.float64)), lattice.mass
    if lattice.chance_of_none > 0.0:
        losses, masses = np.append(0.0, losses), np.append(lattice.chance_of_none, masses)
    with np.errstate(divide="ignore"):
        logs = np.log(masses) + tilt * losses
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
    centre = 0 if lattice.chance_of_none > 0.0 else round(mean / step)
    return Tail(means, mass[used], widths, largest + math.log(total), mean, variance, centre)


@dataclass(frozen=True)
class Spectrum:
    """The transform of one tilted distribution in polar form, shifted by `centre` grid losses to lie around zero.

    `log_ceiling` is the log of the amplitude with the rounding of its transform added. The rare factor of a step, whose
    masses are those of its rare losses alone, has the chance s of none as its amplitude, and `rare` is log(1 + r/s) for
    their transform r.
    """

    log_amplitude: Array
    log_ceiling: Array
    angle: Array
    centre: int
    rare: Complex | None = None
    rare_rounding: float = 0.0


def spectrum_of(lattice: Lattice, tail: Tail, step: float, tilt: float, size: int) -> Spectrum:
    """Returns the spectrum on a circle of `size` grid losses."""
    if lattice.chance_of_none > 0.0:
        return _spectrum_of_rare(lattice, size)
    losses = step * (lattice.first + np.arange(len(lattice.mass), dtype=np.float64))
    with np.errstate(divide="ignore"):
        tilted = lattice.mass * np.exp(np.minimum(tilt * losses - tail.log_scale, 700.0))
    if not np.isfinite(tilted).all() or abs(float(tilted.sum()) - 1.0) > 1e-6:
        with np.errstate(divide="ignore"):
            tilted = np.exp(np.log(lattice.mass) + tilt * losses - tail.log_scale)
    transform = _transform(tilted, lattice.first - tail.centre, size)
    amplitude = np.abs(transform)
    return Spectrum(
        log_amplitude=np.log(np.maximum(amplitude, 1e-300)),
        log_ceiling=np.log(amplitude + _transform_rounding(size)),
        angle=np.arctan2(transform.imag, transform.real),
        centre=tail.centre,
    )


def _spectrum_of_rare(lattice: Lattice, size: int) -> Spectrum:
    chance = lattice.chance_of_none
    constant = np.full(size // 2 + 1, math.log(chance))
    return Spectrum(
        log_amplitude=constant,
        log_ceiling=constant,
        angle=np.zeros(size // 2 + 1),
        centre=0,
        rare=_log1p(_transform(lattice.mass, lattice.first, size) / chance),
        rare_rounding=2.0 * _transform_rounding(size) * float(lattice.mass.sum()) / chance,
    )


def _log1p(z: Complex) -> Complex:
    """Returns log(1 + z) with a small relative error for small z, which NumPy's complex function does not have."""
    x, y = z.real, z.imag
    return np.asarray(0.5 * np.log1p(2.0 * x + x * x + y * y) + 1j * np.arctan2(y, 1.0 + x))


def _expm1(z: Complex) -> Complex:
    """Returns e^z - 1 in the same way."""
    half = np.sin(z.imag / 2.0)
    return np.asarray(np.expm1(z.real) * np.cos(z.imag) - 2.0 * half * half + 1j * np.exp(z.real) * np.sin(z.imag))


def _transform(masses: Array, first: int, size: int) -> Complex:
    start = first % size
    padded = np.zeros(-(-(start + len(masses)) // size) * size)
    padded[start : start + len(masses)] = masses
    return np.fft.rfft(padded.reshape(-1, size).sum(axis=0))


def _transform_rounding(size: int) -> float:
    """Returns what rounding may add to any entry of a transform of masses that sum to 1, and to the masses back.

    Higham, Accuracy and Stability of Numerical Algorithms, theorem 24.2: log2 of the size times a few units.
    """
    return 4.0 * _UNIT * math.log2(max(size, 2))


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
    """Which losses the circle stands for: under the tilt at most e^-wrapped lies below them, and as much above."""

    low: int
    size: int
    wrapped: float


def window_for(tails: list[tuple[Tail, int]], step: float, wrapped: float = WRAPPED) -> Window:
    """Returns the window outside which the tilted composition has at most e^-wrapped on each side, by Chernoff."""
    variance = sum(count * tail.variance for tail, count in tails) + 1e-300
    # What the spectra are not shifted by is the window's middle.
    drift = sum(count * (tail.mean - tail.centre * step) for tail, count in tails)
    ideal = math.sqrt(2.0 * wrapped / variance)
    ends = []
    for side in (1.0, -1.0):
        best = math.inf
        for factor in (0.01, 0.03, 0.06, 0.2, 0.5, 1.0):
            s = side * ideal * factor
            cumulant = sum(count * tail.cumulant(s) for tail, count in tails)
            best = min(best, (cumulant + wrapped) / abs(s))
        ends.append(best)
    low = math.floor((drift - ends[1]) / step) - 2
    high = math.ceil((drift + ends[0]) / step) + 2
    return Window(low, high - low + 1, wrapped)


class Composition:
    """The composition of one direction: counts of each distribution, and from them the masses of their sum."""

    def __init__(self, *, size: int) -> None:
        self.size = size
        self._log_amplitude = np.zeros(size // 2 + 1)
        self._log_ceiling = np.zeros(size // 2 + 1)
        self._angle = np.zeros(size // 2 + 1)
        self._rare: Complex | None = None
        self._rare_rounding = 0.0
        self.shift, self.steps = 0, 0

    def add(self, spectrum: Spectrum, count: int) -> None:
        """Composes `count` more (or, if negative, fewer) of a distribution."""
        self._log_amplitude += count * spectrum.log_amplitude
        self._log_ceiling += count * spectrum.log_ceiling
        self._angle += count * spectrum.angle
        self.shift += count * spectrum.centre
        self.steps += count
        if spectrum.rare is not None:
            self._rare = count * spectrum.rare + (0.0 if self._rare is None else self._rare)
            self._rare_rounding += count * spectrum.rare_rounding

    def masses(self, window: Window) -> tuple[Array, float]:
        """Returns the tilted mass at each loss of the window, and what rounding may have moved at any of them.

        The spectra are products of n factors f, each known to within e: the product is off by at most
        Π(|f| + e) - Π|f|, which the ceilings give. Polar form adds the rounding of its own sums.

        With rare factors s + r among them, what is returned is the part of the composition in which at least one rare
        loss occurred: Πf (Π(s + r) - Πs) = Πf Πs (e^R - 1) with R = Σ log(1 + r/s). Rounding is then relative to the
        probability of a rare loss, and not to 1.
        """
        # Frequencies below e^-60 are far under the rounding; most are, since a composition is smooth.
        used = int(np.flatnonzero(self._log_ceiling > -60.0)[-1]) + 1
        log_amplitude, angle = self._log_amplitude[:used], self._angle[:used]
        amplitude = np.exp(log_amplitude)
        wrong = np.exp(self._log_ceiling[:used]) * -np.expm1(np.minimum(log_amplitude - self._log_ceiling[:used], 0.0))
        wrong += amplitude * 8.0 * _UNIT * (np.abs(angle) + np.abs(log_amplitude) + 1.0)
        transform = np.zeros(len(self._log_amplitude), dtype=np.complex128)
        transform.real[:used] = amplitude * np.cos(angle)
        transform.imag[:used] = amplitude * np.sin(angle)
        scale = 1.0
        if self._rare is not None:
            occurred = _expm1(self._rare[:used])
            size = np.abs(occurred)
            wrong = wrong * size + amplitude * (1.0 + size) * math.expm1(min(self._rare_rounding, 1.0))
            transform[:used] *= occurred
            amplitude = amplitude * size
            scale = float(size.max())
        mass = np.fft.irfft(transform, self.size)
        # Every frequency but the first stands for two, and each adds to every mass at most its own error.
        back = _transform_rounding(self.size)
        rounding = 2.0 * float((wrong + back * amplitude).sum()) / self.size + 2.0 * scale * math.exp(-60.0)
        turn = (window.low - self.shift) % self.size
        return np.concatenate([mass[turn:], mass[:turn]]), rounding
