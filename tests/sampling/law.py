"""Whether batches could be those of Poisson sampling: tests of level about 1e-6 each."""

from __future__ import annotations

import numpy as np
from scipy import stats

LEVEL = 1e-6


def refutations(mask: np.ndarray, rate: float) -> list[str]:
    """Returns what refutes that every entry is an independent coin of probability `rate`."""
    batches, size = mask.shape
    spread = rate * (1 - rate)
    found = {}
    total = stats.binomtest(int(mask.sum()), batches * size, rate).pvalue
    found["total"] = total
    per_example = ((mask.sum(0) - batches * rate) ** 2 / (batches * spread)).sum()
    found["frequency of each example"] = 2 * min(stats.chi2.sf(per_example, size), stats.chi2.cdf(per_example, size))
    sizes = mask.sum(1)
    edges = np.unique(stats.binom.ppf(np.linspace(0.1, 0.9, 9), size, rate))
    edges = edges[edges < size]
    expected = np.diff(np.concatenate([[0.0], stats.binom.cdf(edges, size, rate), [1.0]])) * batches
    counts = np.bincount(np.searchsorted(edges, sizes, side="left"), minlength=len(edges) + 1)
    found["law of the batch size"] = stats.chisquare(counts, expected).pvalue
    centred = (mask - rate) / np.sqrt(spread)
    pairs = centred.T @ centred / np.sqrt(batches)
    off = pairs[np.triu_indices(size, 1)]
    found["pairs of examples"] = 2 * stats.norm.sf(abs(np.sum(off**2) - off.size) / np.sqrt(2 * off.size))
    neighbours = (centred[1:] * centred[:-1]).sum() / np.sqrt(size * (batches - 1))
    found["neighbouring batches"] = 2 * stats.norm.sf(abs(neighbours))
    return [name for name, chance in found.items() if chance < LEVEL]
