"""Several releases of one batch: each a sum with noise of its own, all of them one event."""

from __future__ import annotations

import math
from dataclasses import dataclass

from privet._checks import check_at_least, check_count
from privet.accounting.event import GaussianEvent
from privet.noise.description import Noise
from privet.noise.gaussian import GaussianNoise
from privet.noise.source import NoiseSource

__all__ = ["SeveralReleases"]

_DOWN = 1.0 - 2.0**-48
"""What the multiplier of the event is rounded down by, so that no rounding makes it cheaper than it is."""


@dataclass(frozen=True)
class SeveralReleases(Noise):
    """Gaussian noise on each of several sums of one batch, such as the two gradients of a sharpness-aware step.

    The sums may depend on what was released before. k Gaussian releases of one batch, each of multiplier z, cost what
    one of multiplier z / sqrt(k) costs (Dong, Roth, Su, "Gaussian Differential Privacy", 2022, corollary 3.3, for sums
    that depend on earlier ones too). The batch is sampled once, so that the sampling amplifies the k releases together
    (Zhu, Dong, Wang, 2022, arXiv:2106.08567, theorem 11), and not each by itself: that would be too cheap.

    Attributes:
        multiplier: the standard deviation of the noise of each release over the sensitivity of its sum.
        releases: k, the most releases of one batch.

    Example:
        >>> round(SeveralReleases(1.0, releases=4).event.noise_multiplier, 6)
        0.5
    """

    multiplier: float
    releases: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiplier", check_at_least("noise multiplier", self.multiplier))
        object.__setattr__(self, "releases", check_count("releases", self.releases, 1))

    @property
    def event(self) -> GaussianEvent:
        """Returns the event of all releases of one batch together, before any amplification by sampling."""
        return GaussianEvent(self.multiplier / math.sqrt(self.releases) * _DOWN)

    def with_multiplier(self, multiplier: float) -> SeveralReleases:
        """Returns as many releases with noise of another size."""
        return SeveralReleases(multiplier, self.releases)

    def mechanism(self, source: NoiseSource) -> GaussianNoise:
        """Returns the Gaussian mechanism over a source that nothing else may use."""
        return GaussianNoise(source)
