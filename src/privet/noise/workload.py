"""How large the error of a run is for a matrix C, relative to one example: what correlated noise is optimised for.

A run of n steps shows, with each step, the sum of all gradients so far: after momentum, and times the learning rate.
Under noise C⁻¹ Z the errors of these sums are A C⁻¹ Z. Loss = sens(C) x root mean square over the n sums of the error
of one element. It is the error at a fixed ε where nothing is amplified, and does not depend on the scale of C.

With learning rates η and momentum β, A = L diag(η) M: M_ts = β^(t-s), and L adds up. At a constant rate A has one
number on each diagonal, and all of it costs O(n log n). Under a schedule it costs O(n²).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privet._checks import check_count
from privet.accounting.toeplitz import Toeplitz
from privet.errors import ConfigurationError

__all__ = ["Participation", "Workload", "expected_loss", "loss_and_slope"]

Floats = npt.NDArray[np.float64]
_MOST_SCHEDULED = 4096


@dataclass(frozen=True)
class Workload:
    """What the optimizer does with the noisy gradients, as far as noise is concerned.

    Attributes:
        momentum: β in [0, 1); 0 without momentum.
        learning_rates: one for each step, up to a factor; empty for a constant rate.

    Example:
        >>> Workload(momentum=0.9).momentum
        0.9
    """

    momentum: float = 0.0
    learning_rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigurationError(f"momentum must be in [0, 1), got {self.momentum!r}.")
        rates = tuple(float(rate) for rate in self.learning_rates)
        if any(not math.isfinite(rate) or rate < 0.0 for rate in rates) or (rates and not any(rates)):
            raise ConfigurationError("learning_rates must be finite numbers of at least 0, and not all 0.")
        object.__setattr__(self, "learning_rates", rates)

    def for_steps(self, steps: int) -> None:
        """Raises ConfigurationError unless the workload is one of so many steps."""
        if not self.learning_rates:
            return
        if len(self.learning_rates) != steps:
            raise ConfigurationError(f"{len(self.learning_rates)} learning rates are given for {steps} steps.")
        if steps > _MOST_SCHEDULED:
            raise ConfigurationError(
                f"a schedule of {steps} learning rates takes too long. Expected {_MOST_SCHEDULED} at most. Give a "
                "schedule of the same form over fewer steps, or none."
            )


@dataclass(frozen=True)
class Participation:
    """How often an example takes part in `steps` steps, and how many steps lie between two participations."""

    steps: int
    participations: int = 1
    separation: int | None = None

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("participations", self.participations, 1)
        if self.participations > 1:
            check_count("separation", self.separation, 1)
            assert self.separation is not None
            if (self.participations - 1) * self.separation >= self.steps:
                raise ConfigurationError(
                    f"{self.participations} participations that are {self.separation} steps apart do not fit into "
                    f"{self.steps} steps."
                )

    def spread(self, column: Floats) -> Floats:
        """Returns Σ_i C e_(ib), for the first column of C."""
        if self.participations == 1:
            return column
        assert self.separation is not None
        found = column.copy()
        for index in range(1, self.participations):
            start = index * self.separation
            found[start:] += column[: self.steps - start]
        return found

    def gathered(self, weights: Floats) -> Floats:
        """Returns the transpose of `spread`."""
        if self.participations == 1:
            return weights
        assert self.separation is not None
        found = weights.copy()
        for index in range(1, self.participations):
            start = index * self.separation
            found[: self.steps - start] += weights[start:]
        return found


def expected_loss(matrix: Toeplitz, participation: Participation, workload: Workload | None = None) -> float:
    """Returns sens(C) x the root mean square error of the sums of a run, in units of clip norm x multiplier 1.

    Example:
        >>> round(expected_loss(Toeplitz(), Participation(steps=1024)), 4)
        22.6385
    """
    workload = Workload() if workload is None else workload
    workload.for_steps(participation.steps)
    return loss_and_slope(matrix.column(participation.steps), participation, workload)[0]


def loss_and_slope(column: Floats, participation: Participation, workload: Workload) -> tuple[float, Floats]:
    """Returns the loss of a first column of C, all `steps` entries of it, and its derivative by each of them."""
    moved = participation.spread(column)
    squared = float(moved @ moved)
    inverse = _inverse(column)
    error, slope = (_scheduled if workload.learning_rates else _constant)(inverse, workload)
    # The derivative of w = 1/c, as power series, is -w * w * dc.
    by_column = -_correlated(slope, _product(inverse, inverse))
    loss = math.sqrt(squared * error)
    return loss, loss * (participation.gathered(moved) / squared + by_column / (2.0 * error))


def _constant(inverse: Floats, workload: Workload) -> tuple[float, Floats]:
    """Returns the mean squared error at a constant rate, and its derivative by the first column of C⁻¹."""
    steps = len(inverse)
    # Momentum's power series, added up: 1, 1 + β, 1 + β + β², ...
    sums = np.cumsum(np.power(workload.momentum, np.arange(steps), dtype=np.float64))
    left = np.arange(steps, 0, -1) / steps  # in how many of the sums an entry appears
    errors = _product(sums, inverse)
    return float(left @ errors**2), _correlated(2.0 * left * errors, sums)


def _scheduled(inverse: Floats, workload: Workload) -> tuple[float, Floats]:
    """Returns the same under a schedule: column s of A C⁻¹ adds up η_t g_(t-s), g being momentum times C⁻¹."""
    steps, rates = len(inverse), np.array(workload.learning_rates)
    rates = rates / math.sqrt(float(np.mean(rates**2)))
    series = np.power(workload.momentum, np.arange(steps), dtype=np.float64)
    step = _product(series, inverse)
    total, slope = 0.0, np.zeros(steps)
    for first in range(steps):
        errors = np.cumsum(rates[first:] * step[: steps - first])
        total += float(errors @ errors)
        slope[: steps - first] += 2.0 * rates[first:] * np.cumsum(errors[::-1])[::-1]
    return total / steps, _correlated(slope / steps, series)


def _product(one: Floats, other: Floats) -> Floats:
    """Returns the product of two power series, as many terms of it as they have."""
    size = 1 << (2 * len(one) - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size), size)[: len(one)]


def _correlated(values: Floats, series: Floats) -> Floats:
    """Returns the transpose of the product with a series: Σ_t values_t series_(t-k)."""
    return _product(values[::-1], series)[::-1]


def _inverse(column: Floats) -> Floats:
    """Returns the power series 1 / c, by Newton's iteration, which doubles the terms that are right."""
    found = np.array([1.0 / column[0]])
    while len(found) < len(column):
        size = min(2 * len(found), len(column))
        grown = np.zeros(size)
        grown[: len(found)] = found
        residue = -_product(column[:size], grown)
        residue[0] += 2.0
        found = _product(grown, residue)
    return found
