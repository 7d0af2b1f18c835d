"""The event of discrete Gaussian noise on an integer grid, and the Gaussian mechanism that bounds it.

The sum x of d values is rounded to multiples of γ, and gets independent N_Z(0, s²) noise in units of γ:
P(z) is proportional to e^(-z²/2s²) over the integers. s is at least `LEAST_SCALE`.

1. How far a neighbor moves the rounded sum. In units of the sensitivity S = sγ/σ the sums differ by at most 1, and by
   1 + e where floating-point arithmetic moved them. Rounding moves each value by at most γ/2 on either side, so that
   the rounded sums differ by at most S (1 + e) + γ √d. Over the standard deviation sγ that is

       μ = (1 + e) / σ + √d / s.

2. What the noise is worth. Let Y be N(x, τ²) with τ² = s² - η², and Z a draw from the integers with weights
   e^(-(z-Y)²/2η²). By Poisson's summation formula these weights add up to η √(2π) (1 ± θ) for every Y, with
   θ < 2.01 e^(-2π²η²); hence P(Z = z) is within a factor 1 ± 2θ of the density of N(x, s²) at z, and so of
   x + N_Z(0, s²). Z is made of Y alone. So the whole release is, up to a factor (1 ± 2θ)^(2d), a function of what a
   Gaussian mechanism with deviation τ releases, in any dimension, on any sample and adaptively (Peikert,
   IACR ePrint 2010/088, theorem 3.1, has the same convolution). With η = 8, θ is below 10^-548, and the
   factor nearer to 1 than 10^-530: no ε and no δ that a float64 can hold shows it. τ/s is 1 - 2^-75 at least.

So the event costs what a Gaussian with noise multiplier 1 / μ costs. A record that is zeroed out counts as one that is
not in the batch, so that the sum without it is one and the same on both sides. The discrete Gaussian also satisfies
zCDP with ρ = μ²/2 in any dimension (Canonne, Kamath and Steinke, arXiv 2004.00010), which is the
same Rényi bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from privet._checks import check_at_least
from privet.accounting.event import Event

__all__ = ["LEAST_SCALE", "MOST_VALUES", "DiscreteGaussianEvent"]

LEAST_SCALE = 2**40
"""The least standard deviation of the noise, in units of the grid."""

MOST_VALUES = 2**40
"""The largest number of values that are released together: a million million."""

_GROWTH = math.sqrt(MOST_VALUES) / LEAST_SCALE  # of μ, by rounding to the grid: 2^-20
_ARITHMETIC = 2.0**-50  # relative: the rounding of σS to a float64, and τ against s


@dataclass(frozen=True)
class DiscreteGaussianEvent(Event, kind="discrete_gaussian"):
    """A sum that is rounded to a grid, with discrete Gaussian noise of `noise_multiplier` times its sensitivity.

    Attributes:
        noise_multiplier: the standard deviation of the noise over the sensitivity of the sum before it is rounded.
        sum_error: how far floating-point arithmetic moves the sums of two neighbors apart, over the sensitivity.

    Example:
        >>> 0.9989 < DiscreteGaussianEvent(1.0, sum_error=0.001).gaussian_multiplier < 0.9991
        True
    """

    noise_multiplier: float
    sum_error: float

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "sum_error"):
            object.__setattr__(self, name, check_at_least(name, getattr(self, name)))

    @property
    def gaussian_multiplier(self) -> float:
        """Returns the noise multiplier of a Gaussian mechanism that is no more private than the release."""
        if self.noise_multiplier < 1e-150:  # its inverse leaves the range of float64
            return 0.0
        shift = (1.0 + self.sum_error) / self.noise_multiplier + _GROWTH
        return (1.0 - _ARITHMETIC) / shift
