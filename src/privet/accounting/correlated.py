"""Events of correlated noise: one release of many, and passes over the data in a fixed order.

A release says nothing by itself, since its noise is shared with other steps: what it costs depends on how far apart the
steps lie in which one example takes part. So it stands in no other event than those below, which the sampling makes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from privet._checks import check_at_least, check_count
from privet.accounting.event import Event, GaussianEvent
from privet.accounting.toeplitz import Toeplitz
from privet.errors import ConfigurationError

__all__ = ["CorrelatedEvent", "CorrelatedRelease", "in_one_participation"]


@dataclass(frozen=True)
class CorrelatedRelease(Event, kind="correlated_release"):
    """The release of one step whose noise is correlated with that of other steps, by C (see `Toeplitz`).

    `noise_multiplier` is the standard deviation of the independent noise over the sensitivity of one participation. By
    itself the release has no finite ε. `CorrelatedEvent` says what passes of a partition cost.
    """

    needs_separation: ClassVar[bool] = True

    noise_multiplier: float
    coefficients: tuple[float, ...] = (1.0,)
    scales: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        matrix = Toeplitz(self.coefficients, self.scales, self.decays)
        for name in ("coefficients", "scales", "decays"):
            object.__setattr__(self, name, getattr(matrix, name))
        object.__setattr__(self, "noise_multiplier", check_at_least("noise_multiplier", self.noise_multiplier))

    @property
    def matrix(self) -> Toeplitz:
        """Returns C."""
        return Toeplitz(self.coefficients, self.scales, self.decays)


@dataclass(frozen=True)
class CorrelatedEvent(Event, kind="correlated"):
    """`event` on every batch of a partition of the data in a fixed order, `passes` times over.

    Each example takes part once in `separation` steps, which are the batches of a pass. All passes are one Gaussian
    mechanism with μ = ‖Σ_{i < passes} C e_{i separation}‖ / (noise_multiplier ‖C e_0‖).

    It also covers correlation that begins anew at any step, and passes of several such runs that are counted together:
    C is then block diagonal and nowhere larger, and the squares of the norms of its blocks add up to less.
    """

    passes: int
    separation: int
    event: CorrelatedRelease

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", check_count("passes", self.passes))
        object.__setattr__(self, "separation", check_count("separation", self.separation, 1))
        if not isinstance(self.event, CorrelatedRelease):
            raise ConfigurationError(f"event must be a CorrelatedRelease, got {self.event!r}.")

    def whole_phase(self, count: int) -> Event:
        """Returns the event of `count` repetitions: so many more passes."""
        return CorrelatedEvent(self.passes * count, self.separation, self.event)

    @property
    def gaussian_multiplier(self) -> float:
        """Returns the noise multiplier of the one Gaussian mechanism that all passes are together."""
        squared = self.event.matrix.squared_sensitivity(self.passes, self.separation)
        return self.event.noise_multiplier / math.sqrt(squared) if squared > 0.0 else math.inf


def in_one_participation(event: Event, separation: int) -> Event:
    """Returns what one participation costs, where an example takes part at most once in `separation` steps.

    An event without correlation is returned as it is. Correlated noise with no more than `separation` bands costs a
    Gaussian release of its multiplier in each participation, since the columns of C that an example moves do not
    overlap; each may be sampled by a coin of its own (Choquette-Choo et al., arXiv 2306.08153, theorem 4).

    Raises:
        ConfigurationError: if the correlation reaches further.
    """
    if not isinstance(event, CorrelatedRelease):
        return event
    bands = event.matrix.bands
    if bands is None or bands > separation:
        found = "without a last band" if bands is None else f"with {bands} bands"
        raise ConfigurationError(
            f"the noise is correlated over steps {found}, and an example may take part again after {separation} steps. "
            f"Expected at most {separation} bands: then each participation is a Gaussian release of its own. Use "
            f"BandMF with {separation} coefficients or fewer, or sample in more parts."
        )
    return GaussianEvent(event.noise_multiplier)
