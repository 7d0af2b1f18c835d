"""Cumulants of one pass of random allocation, exact at whole orders, found without any grid of losses.

X is the mean of t independent w_j = e^((2 y_j - 1) / 2σ²), as in `allocation`. The record's removal costs
K(α) = log E X^α and its addition log E X^(1 - α). Neither is known to be the larger one.

* E X^α by the multinomial theorem: α! times the coefficient of z^α in (Σ_j z^j E w^j / j!)^t, over t^α, where
  E w^j = e^(j (j - 1) / 2σ²). Feldman and Shenfeld, arXiv 2502.08202, section 4, in another form.
* E X^-s = 1/Γ(s) ∫ θ^(s - 1) E e^(-θ X) dθ, and E e^(-θ X) = φ(θ / t)^t with the Laplace transform φ of one w.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privet.accounting import _special as special

__all__ = ["LARGEST_ORDER", "allocation_cumulant"]

Array = NDArray[np.float64]
LARGEST_ORDER = 64
_SLACK = 1e-8  # relative; what rounding and the quadratures may have taken
_ABSOLUTE = 1e-10  # logs of sizes up to some thousands are subtracted


def allocation_cumulant(noise_multiplier: float, steps: int, order: float) -> float:
    """Returns K(α) of one pass, the larger one of the two directions, for α > 1.

    Between whole orders it is the chord, which lies above: K is convex, and 0 at α = 1. Above `LARGEST_ORDER` it is
    that of the Gaussian without amplification.
    """
    if order > LARGEST_ORDER:
        return order * (order - 1.0) / (2.0 * noise_multiplier**2)
    known = _at_whole_orders(noise_multiplier, steps)
    low = min(math.floor(order), LARGEST_ORDER - 1)
    share = order - low
    value = (1.0 - share) * known[low] + share * known[low + 1]
    return float(value * (1.0 + _SLACK)) + _ABSOLUTE


@lru_cache(maxsize=256)
def _at_whole_orders(noise_multiplier: float, steps: int) -> Array:
    """Returns K at 0, 1, 2 ... `LARGEST_ORDER`."""
    removal = _removal(noise_multiplier, steps)
    return np.maximum(removal, _addition(noise_multiplier, steps, removal))


def _removal(noise_multiplier: float, steps: int) -> Array:
    order = np.arange(LARGEST_ORDER + 1, dtype=np.float64)
    factorial = special.gammaln(order + 1.0)
    one = order * (order - 1.0) / (2.0 * noise_multiplier**2) - factorial
    total = one
    for bit in bin(steps)[3:]:
        total = _product(total, total)
        if bit == "1":
            total = _product(total, one)
    found: Array = np.maximum(total + factorial - order * math.log(steps), 0.0)
    return found


def _product(one: Array, other: Array) -> Array:
    """Returns the logs of the coefficients of a product of two power series, up to the largest order."""
    found = np.empty(len(one))
    for order in range(len(one)):
        logs = one[: order + 1] + other[order::-1]
        largest = logs.max()
        found[order] = largest + math.log(float(np.exp(logs - largest).sum()))
    return found


def _addition(noise_multiplier: float, steps: int, enough: Array) -> Array:
    """Returns K of the addition at whole orders; where a simple bound is at most `enough`, that one.

    The mean is at least the geometric mean, which is lognormal: E X^-s <= e^(s / 2σ² + s² / 2tσ²).
    """
    variance = 1.0 / noise_multiplier**2
    s = np.arange(LARGEST_ORDER + 1, dtype=np.float64) - 1.0
    found = np.maximum(s * (1.0 + s / steps), 0.0) * variance / 2.0
    needed = np.flatnonzero(found > enough)
    if needed.size:
        highest = float(s[needed[-1]])
        exact = _moments_of_inverse(noise_multiplier, steps, highest)
        found[needed] = np.minimum(found[needed], exact[needed])
    return found


def _moments_of_inverse(noise_multiplier: float, steps: int, highest: float) -> Array:
    """Returns log E X^-s for s = 1 ... `highest`, at the indices s + 1, by trapezoid rules over log θ and over y.

    The integrands are analytic in strips of half-width π/2 and πσ²/2 around the real line, so that the rules converge
    exponentially (Trefethen and Weideman, SIAM Review 56, 2014, theorem 5.1): within e^-25 of the value.
    """
    variance = 1.0 / noise_multiplier**2
    # Under the tilt X^-s the numbers have s/t each, so far as they share it evenly.
    drift = highest / steps
    node = min(noise_multiplier, 1.0) / 5.0
    z = np.arange(-14.0 - drift / noise_multiplier, 14.0, node)
    log_mass = math.log(node / math.sqrt(2.0 * math.pi)) - z**2 / 2.0
    log_w = z / noise_multiplier - variance / 2.0
    # Past its peak the integrand falls at least like that of the geometric mean.
    end = variance / 2.0 + drift * variance + math.sqrt(100.0 * variance / steps) + math.log(highest) + 8.0
    height = 0.1
    u = np.arange(-45.0, end, height)
    log_phi = np.array([_log_laplace(each - math.log(steps), log_w, log_mass) for each in u])
    found = np.full(LARGEST_ORDER + 1, np.inf)
    for s in range(1, int(highest) + 1):
        logs = s * u + steps * log_phi + math.log(height) - math.lgamma(s)
        largest = float(logs.max())
        found[s + 1] = largest + math.log(float(np.exp(logs - largest).sum()))
    positive: Array = np.maximum(found, 0.0)
    return positive


def _log_laplace(log_argument: float, log_w: Array, log_mass: Array) -> float:
    """Returns log E e^(-θ w), without cancellation near θ = 0 and without underflow far from it."""
    exponents = -np.exp(np.minimum(log_argument + log_w, 700.0))
    less = float(np.exp(log_mass) @ -np.expm1(exponents))
    if less < 0.5:
        return math.log1p(-less)
    logs = exponents + log_mass
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).sum()))
