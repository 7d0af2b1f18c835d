"""Cumulants K(α) = log E_Q[(P/Q)^α] = (α - 1) ρ(α) of every dominating pair: what Rényi accounting adds up.

Sources, at the lines that implement them: Mironov, Talwar and Zhang, arXiv 1908.10530; Charles et al., 2407.07737.
Every value is rounded up by its stated error.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privet.accounting import _special as special
from privet.accounting.allocation_renyi import LARGEST_ORDER, allocation_cumulant
from privet.accounting.terms import Pair, Part, Reduced

__all__ = ["Cumulant", "mixture_cumulant", "pair_cumulant", "symmetric_cumulant"]

Array = NDArray[np.float64]
# What rounding may have taken from a cumulant, relative; the tests compare with 40 digits at a tenth of it.
_SLACK = 1e-10
_MOST_POINTS = 200_000
_LARGEST_ORDER = {
    Pair.MIXTURE: 10_000.0,
    Pair.SYMMETRIC: 2_000.0,
    Pair.REPLACE: 2_000.0,
    Pair.GROUP: 2_000.0,
    Pair.RARE: 2_000.0,
    Pair.ALLOCATION: float(LARGEST_ORDER),
}


def _logsumexp(values: Array) -> Array:
    largest = values.max(axis=-1)
    total: Array = largest + np.log(np.exp(values - largest[..., None]).sum(axis=-1))
    return total


def mixture_cumulant(rate: Array, noise_multiplier: Array, order: float) -> Array:
    """Returns K(α) of (1-q) N(0, σ²) + q N(1, σ²) against N(0, σ²) for arrays of q and σ. This order dominates."""
    if order == round(order):
        return _whole_order(rate, noise_multiplier, round(order))
    values = _signed_series(rate, noise_multiplier, order)
    # Below this the series' "1 +" has eaten the digits that matter; the quadrature never forms it.
    small = np.flatnonzero(~(values > 1e-4))
    for index in small:
        part = Part(Pair.MIXTURE, float(rate[index]), float(noise_multiplier[index]))
        values[index] = pair_cumulant(part, order)
    return values


def _whole_order(rate: Array, noise_multiplier: Array, order: int) -> Array:
    """1908.10530, section 3.3: A = Σ C(α,k) (1-q)^(α-k) q^k e^(k(k-1)/2σ²), less the 1 that k = 0, 1 sum to."""
    k = np.arange(2, order + 1, dtype=np.float64)
    binomial = special.log_binomial(order, k)
    q, sigma = rate[:, None], noise_multiplier[:, None]
    exponent = k * (k - 1.0) / (2.0 * sigma**2)
    with np.errstate(divide="ignore"):
        logs = binomial + (order - k) * np.log1p(-q) + k * np.log(q) + exponent + np.log(-np.expm1(-exponent))
    result: Array = np.logaddexp(0.0, _logsumexp(logs)) * (1.0 + _SLACK)
    return result


def _signed_series(rate: Array, noise_multiplier: Array, order: float) -> Array:
    """1908.10530, section 3.3: the two series for fractional orders, with the sign that C(α, i) has for i > α.

    Past α the terms alternate and shrink like a power of i, so the tail is summed by averaging partial sums, and the
    last two averages differ by more than what is left.
    """
    count = math.ceil(order) + 160
    i = np.arange(count, dtype=np.float64)
    sign = special.gammasgn(order - i + 1.0)
    binomial = special.log_binomial(order, i)
    q, sigma = rate[:, None], noise_multiplier[:, None]
    split = sigma**2 * (np.log1p(-q) - np.log(q)) + 0.5
    j = order - i
    left = j * np.log1p(-q) + i * np.log(q) + i * (i - 1.0) / (2.0 * sigma**2) + special.log_ndtr((split - i) / sigma)
    right = i * np.log1p(-q) + j * np.log(q) + j * (j - 1.0) / (2.0 * sigma**2) + special.log_ndtr((j - split) / sigma)
    logs = binomial + np.logaddexp(left, right)
    largest = logs.max(axis=-1, keepdims=True)
    sums = np.cumsum(sign * np.exp(logs - largest), axis=-1)[:, -60:]
    while sums.shape[1] > 2:
        sums = (sums[:, 1:] + sums[:, :-1]) / 2.0
    total = sums.max(axis=1) + np.abs(sums[:, 1] - sums[:, 0])
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = (largest[:, 0] + np.log(total)) * (1.0 + _SLACK)
    return result


def _excess(log_ratio: Array, order: float) -> Array:
    """Returns log(r^α - 1 - α (r - 1)) for r = e^log_ratio: what E_Q[r^α] - 1 is the mean of, and never negative."""
    u = np.expm1(np.minimum(log_ratio, 700.0))
    power = order * log_ratio
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        series = order * (order - 1.0) / 2.0 * u**2 * (1.0 + (order - 2.0) * u / 3.0 * (1.0 + (order - 3.0) * u / 4.0))
        direct = np.expm1(np.minimum(power, 40.0)) - order * u
        near = np.abs(u) * max(1.0, abs(order)) < 1e-4
        value = np.log(np.where(near, series, np.maximum(direct, 0.0)))
        return np.where(power > 40.0, np.where(order > 1.0, power, np.logaddexp(power, np.log(np.abs(u)))), value)


def _log_ratio(part: Part, x: Array) -> Array:
    """Returns log(P/Q) at x, without cancellation where the rate is small."""
    q, sigma = part.rate, part.noise_multiplier

    def tilted(shift: float) -> Array:
        exponent = (2.0 * shift * x - shift**2) / (2.0 * sigma**2)
        return np.where(exponent < 500.0, np.log1p(q * np.expm1(np.minimum(exponent, 500.0))), math.log(q) + exponent)

    if part.pair is Pair.REPLACE:
        return tilted(-1.0) - tilted(1.0)
    if part.pair is Pair.GROUP:
        i = np.arange(part.group_size + 1.0)[:, None]
        size = float(part.group_size)
        logs = special.log_binomial(size, i) + i * math.log(q)
        logs = logs + (size - i) * math.log1p(-q) + (2.0 * i * x - i**2) / (2.0 * sigma**2)
        return _logsumexp(logs.T)
    return tilted(1.0)


def pair_cumulant(part: Part, order: float) -> float:
    """Returns K(α) by the trapezoid rule on E_Q[r^α - 1 - α (r - 1)], which has no sign to lose.

    The integrand is analytic in a strip of half-width πσ² around the real line, so the rule converges exponentially
    (Trefethen and Weideman, SIAM Review 56, 2014, theorem 5.1): here the error is below e^-35 of the value.
    """
    q, sigma, reach = part.rate, part.noise_multiplier, 14.0 * part.noise_multiplier
    step = min(sigma / 6.0, sigma**2 * 0.5)
    highest = (2.0 * order + 1.0 if part.pair is Pair.REPLACE else order) * part.group_size
    if (highest + 2.0 * reach) / step > _MOST_POINTS:
        # Sampling never hurts, so the Gaussian that it samples is a bound; where σ is this small it is a near one.
        shift = 2.0 if part.pair is Pair.REPLACE else float(part.group_size)
        return order * (order - 1.0) * (shift / sigma) ** 2 / 2.0
    x = np.arange(-highest - reach if part.pair is Pair.REPLACE else -reach, highest + reach, step)
    log_q = -(x**2) / (2.0 * sigma**2) - math.log(sigma * math.sqrt(2.0 * math.pi)) + math.log(step)
    ratio = _log_ratio(part, x)
    if part.pair is Pair.REPLACE:
        other = (2.0 * x - 1.0) / (2.0 * sigma**2)
        log_q = log_q + np.logaddexp(math.log1p(-q), math.log(q) + other)
    logs = [_excess(ratio, order)]
    if part.pair is Pair.GROUP:
        logs.append(_excess(ratio, 1.0 - order))  # E_P[(Q/P)^α] = E_Q[r^(1-α)]: the other direction
    value = max(float(_logsumexp(log_q + each)) for each in logs)
    return float(np.logaddexp(0.0, value)) * (1.0 + _SLACK)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@lru_cache(maxsize=4096)
def symmetric_cumulant(rate: float, noise_multiplier: float, order: float) -> float:
    """Returns K(α) of the symmetrised profile of the mixture at shift 1, for σ over the distance between neighbours.

    Its loss has P on positive losses ℓ, Q mirrored on negative ones and the rest at 0 (decision 13), so with s = α - 1

        E[e^(sL)] - 1 = ∫ over ℓ > 0 of  P (e^(sℓ) - 1) + Q (e^(-sℓ) - 1)  =  ∫ Q (1 - e^(-sℓ)) (e^((s+1)ℓ) - 1),

    in which nothing cancels. Gauss and Legendre's rule with 16 nodes on panels of half σ, from x = 1/2 where ℓ = 0.
    """
    sigma, s = noise_multiplier, order - 1.0
    width = min(sigma / 2.0, 2.0 * sigma**2)
    panels = math.ceil((order + 14.0 * sigma) / width)
    if panels * len(_NODES) > _MOST_POINTS:
        # Sampling never hurts, so the Gaussian that it samples is a bound; where σ is this small it is a near one.
        return order * s / (2.0 * sigma**2)
    starts = 0.5 + width * np.arange(panels)
    x = (starts[:, None] + width * (_NODES + 1.0) / 2.0).ravel()
    log_weights = np.tile(np.log(_WEIGHTS * width / 2.0), panels)
    log_q = -(x**2) / (2.0 * sigma**2) - math.log(sigma * math.sqrt(2.0 * math.pi)) + log_weights
    loss = np.maximum(_log_ratio(Part(Pair.MIXTURE, rate, sigma), x), 0.0)
    with np.errstate(divide="ignore"):
        falling = np.log(-np.expm1(-s * loss))
        rising = (s + 1.0) * loss + np.log(-np.expm1(-(s + 1.0) * loss))
    value = float(_logsumexp(log_q + falling + rising))
    return float(np.logaddexp(0.0, value)) * (1.0 + _SLACK)


def _part_cumulant(part: Part, order: float) -> float:
    if part.pair is Pair.RARE:
        return math.inf
    if part.pair is Pair.ALLOCATION:
        return allocation_cumulant(part.noise_multiplier, part.steps, order)
    if part.pair is Pair.SYMMETRIC:
        return symmetric_cumulant(part.rate, part.noise_multiplier / 2.0, order)
    if part.pair is Pair.MIXTURE:
        rate, noise_multiplier = np.array([part.rate]), np.array([part.noise_multiplier])
        if part.rate == 1.0:
            return order * (order - 1.0) / (2.0 * part.noise_multiplier**2)
        return float(mixture_cumulant(rate, noise_multiplier, order)[0])
    return pair_cumulant(part, order)


class Cumulant:
    """The cumulant of everything an event reduces to, a convex function of α with K(1) = 0."""

    def __init__(self, reduced: Reduced) -> None:
        self._squared_mu = reduced.squared_mu
        plain, self._others = [], []
        for term, count in reduced.terms.items():
            weight, part = term.parts[0]
            if part.pair is Pair.MIXTURE and weight == 1.0:
                plain.append((part.rate, part.noise_multiplier, float(count)))
            else:
                self._others.append((term, count))
        self._rate, self._noise, self._count = np.array(plain, dtype=np.float64).reshape(-1, 3).T
        pairs = {part.pair for term in reduced.terms for _, part in term.parts}
        self.largest_order = min((_LARGEST_ORDER[pair] for pair in pairs), default=1e12)

    def __call__(self, order: float) -> float:
        """Returns K(α), for 1 < α <= `largest_order`."""
        total = order * (order - 1.0) / 2.0 * self._squared_mu
        if self._rate.size:
            total += float(self._count @ mixture_cumulant(self._rate, self._noise, order))
        for term, count in self._others:
            logs = [math.log(weight) + _part_cumulant(part, order) for weight, part in term.parts]
            if math.inf in logs:
                return math.inf
            left = 1.0 - sum(weight for weight, _ in term.parts)
            if left > 0.0:
                logs.append(math.log(left))  # what no part covers releases nothing
            total += count * max(0.0, float(_logsumexp(np.array(logs))))
        return total

    def sketch(self) -> Cumulant:
        """Returns about the same cumulant from a sample of the terms: where to look, and no bound."""
        every = -(-len(self._rate) // 16)
        if every <= 1:
            return self
        found = copy.copy(self)
        found._rate, found._noise = self._rate[::every], self._noise[::every]  # noqa: SLF001
        share = self._count.sum() / self._count[::every].sum()
        found._count = self._count[::every] * share  # noqa: SLF001
        return found
