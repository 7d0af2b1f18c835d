"""δ of random allocation in other ways than the library's: closed forms for one of the steps, given all others.

Given the sum S of the other numbers, E(w - K)+ over one lognormal w of mean 1 is the price of an option (Black and
Scholes). What is left is a mean over S: by the trapezoid rule for two and three steps, by Monte Carlo for many.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import stats


def call(strike: np.ndarray, sigma: float) -> np.ndarray:
    """E(w - K)+ for log w ~ N(-1/2σ², 1/σ²)."""
    low = strike <= 0
    k = np.where(low, 1.0, strike)
    d = (0.5 / sigma - np.log(k) * sigma, -0.5 / sigma - np.log(k) * sigma)
    return np.where(low, 1.0 - strike, stats.norm.cdf(d[0]) - k * stats.norm.cdf(d[1]))


def put(strike: np.ndarray, sigma: float) -> np.ndarray:
    """E(K - w)+."""
    low = strike <= 0
    k = np.where(low, 1.0, strike)
    d = (0.5 / sigma - np.log(k) * sigma, -0.5 / sigma - np.log(k) * sigma)
    return np.where(low, 0.0, k * stats.norm.cdf(-d[1]) - stats.norm.cdf(-d[0]))


def given_others(others: np.ndarray, sigma: float, steps: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """δ of removal and of addition, given the sum of the other numbers under the data without the record."""
    removal = call(steps * math.exp(epsilon) - others, sigma) / steps
    addition = put(steps * math.exp(-epsilon) - others, sigma) * math.exp(epsilon) / steps
    return removal, addition


def by_integration(sigma: float, steps: int, epsilon: float) -> tuple[float, float]:
    """δ of both directions for two or three steps."""
    z = np.arange(-12.0, 12.0 + 1.0 / sigma, min(sigma, 1.0) / 12.0)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    w = np.exp(z / sigma - 0.5 / sigma**2)
    others, mass = w, weight
    for _ in range(steps - 2):
        others = (others[:, None] + w).ravel()
        mass = (mass[:, None] * weight).ravel()
    removal, addition = given_others(others, sigma, steps, epsilon)
    return float(mass @ removal), float(mass @ addition)


def sums(rng: np.random.Generator, sigma: float, terms: int, samples: int) -> np.ndarray:
    """Samples of a sum of lognormal numbers."""
    found = []
    while samples > 0:
        rows = min(samples, max(1, 2_000_000 // terms))
        found.append(np.exp(rng.standard_normal((rows, terms), dtype=np.float32) / sigma - 0.5 / sigma**2).sum(1))
        samples -= rows
    return np.concatenate(found).astype(np.float64)


def interval(values: np.ndarray, deviations: float = 5.0) -> tuple[float, float]:
    """A confidence interval of the mean, of five standard errors on each side."""
    error = deviations * float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) - error, float(values.mean()) + error


def two_passes(rng: np.random.Generator, sigma: float, steps: int, epsilon: float, samples: int) -> np.ndarray:
    """Samples whose mean is δ of the record's removal in two passes: the first pass drawn with the record."""
    first = sums(rng, sigma, steps - 1, samples) + np.exp(
        (2 * (1 + sigma * rng.standard_normal(samples)) - 1) / (2 * sigma**2)
    )
    ratio = first / steps
    others = sums(rng, sigma, steps - 1, samples)
    return np.asarray(call(steps * math.exp(epsilon) / ratio - others, sigma) / steps)


def whole_order(sigma: float, steps: int, order: int) -> float:
    """log E X^order by all ways to deal `order` factors to the steps; for few steps."""
    total = 0.0
    for counts in itertools.product(range(order + 1), repeat=steps):
        if sum(counts) == order:
            ways = math.factorial(order) / math.prod(math.factorial(k) for k in counts)
            total += ways * math.exp(sum(k * (k - 1) for k in counts) / (2 * sigma**2))
    return math.log(total) - order * math.log(steps)
