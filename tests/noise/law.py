"""Whether values could be N(0, std**2): tests of level about 1e-6 each that also reject 2/3 and 3/2 of the std."""

from __future__ import annotations

import numpy as np
from scipy import stats

LEVEL = 1e-6


def refutations(values: np.ndarray, std: float) -> list[str]:
    """Returns the names of the tests that refute the law N(0, std**2), independent from element to element."""
    scaled = np.asarray(values, dtype=np.float64).ravel() / std
    count = scaled.size
    square = float(np.sum(scaled**2))
    chances = {
        "mean": 2 * stats.norm.sf(abs(scaled.mean()) * np.sqrt(count)),
        "variance": 2 * min(stats.chi2.sf(square, count), stats.chi2.cdf(square, count)),
        "shape": stats.kstest(scaled, "norm").pvalue,
        # The fourth moment of a standard normal value has mean 3 and variance 96.
        "fourth moment": 2 * stats.norm.sf(abs(np.mean(scaled**4) - 3) / np.sqrt(96 / count)),
    }
    for lag in (1, 2, 64, count // 2):
        product = np.mean(scaled[lag:] * scaled[:-lag]) * np.sqrt(count - lag)
        chances[f"correlation at lag {lag}"] = 2 * stats.norm.sf(abs(product))
        # The squares of a pair of Box-Muller must be independent too.
        squares = np.mean((scaled[lag:] ** 2 - 1) * (scaled[:-lag] ** 2 - 1)) / 2 * np.sqrt(count - lag)
        chances[f"correlation of squares at lag {lag}"] = 2 * stats.norm.sf(abs(squares))
    return [name for name, chance in chances.items() if chance < LEVEL]
