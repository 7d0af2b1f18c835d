"""The role of a noise, as a frozen description: what one release costs, and what adds the noise at run time.

A noise of your own is one class in one file (docs/extending/noise.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from privet._checks import check_at_least
from privet.accounting.event import Event, GaussianEvent
from privet.noise.gaussian import GaussianNoise, NoiseMechanism
from privet.noise.source import NoiseSource

__all__ = ["Gaussian", "Noise"]


class Noise(ABC):
    """What is added to a clipped sum. It holds public numbers only.

    Guarantees expected of an implementation: what `mechanism` releases at `multiplier` is at least as private as
    `event` says, for every clipped sum.
    """

    multiplier: float
    """The standard deviation of the noise over the sensitivity of the sum."""

    @property
    @abstractmethod
    def event(self) -> Event:
        """Returns the event of one release, before any amplification by sampling."""

    @abstractmethod
    def with_multiplier(self, multiplier: float) -> Noise:
        """Returns the same noise of another size, for calibration and schedules."""

    @abstractmethod
    def mechanism(self, source: NoiseSource) -> NoiseMechanism:
        """Returns what adds the noise, drawn from `source`; each call serves one run."""


@dataclass(frozen=True)
class Gaussian(Noise):
    """Gaussian noise of standard deviation `multiplier` times the sensitivity of the clipped sum.

    Example:
        >>> Gaussian(1.1).event
        GaussianEvent(noise_multiplier=1.1)
    """

    multiplier: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiplier", check_at_least("noise multiplier", self.multiplier))

    @property
    def event(self) -> GaussianEvent:
        """Returns the event of one release, before any amplification by sampling."""
        return GaussianEvent(self.multiplier)

    def with_multiplier(self, multiplier: float) -> Gaussian:
        """Returns Gaussian noise of another size."""
        return Gaussian(multiplier)

    def mechanism(self, source: NoiseSource) -> GaussianNoise:
        """Returns the Gaussian mechanism over a source that nothing else may use."""
        return GaussianNoise(source)
