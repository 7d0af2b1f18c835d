"""ε of a group of k records under Poisson sampling: the law of the binomial mixture, integrated here by other means.

Charles et al., arXiv 2407.07737, and Ganesh, arXiv 2401.10294: how many of the group's records are in a batch is
Bin(k, q), and the worst that they can do is to point the same way.
"""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest

from privet.accounting import GaussianEvent, PoissonEvent, SelfComposedEvent, get_delta, get_epsilon

CASES = [(2, 0.1, 1.0, 0.5), (5, 0.05, 1.0, 1.0), (8, 0.3, 2.0, 0.3), (3, 0.9, 0.8, 2.0)]


def hockey_sticks(size: int, rate: float, sigma: float, epsilon: float) -> tuple[float, float]:
    """Returns δ at ε with the group removed, and added: ∫ max(p - e^ε q, 0) and ∫ max(q - e^ε p, 0), with 30 digits."""
    mpmath.mp.dps = 30
    weights = [
        mpmath.binomial(size, j) * mpmath.mpf(rate) ** j * (1 - mpmath.mpf(rate)) ** (size - j) for j in range(size + 1)
    ]

    def ratio(x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.fsum(
            w * mpmath.exp((2 * x * j - j * j) / (2 * mpmath.mpf(sigma) ** 2)) for j, w in enumerate(weights)
        )

    def cross(target: mpmath.mpf) -> mpmath.mpf | None:
        low, high = mpmath.mpf(-60 * sigma), mpmath.mpf(60 * sigma + size)
        if ratio(low) > target:
            return None
        for _ in range(110):  # the ratio grows with x
            middle = (low + high) / 2
            low, high = (middle, high) if ratio(middle) < target else (low, middle)
        return low

    def above(x: mpmath.mpf, shift: int) -> mpmath.mpf:
        return mpmath.ncdf((shift - x) / sigma)

    grown = mpmath.exp(epsilon)
    x = cross(grown)
    removed = mpmath.fsum(w * above(x, j) for j, w in enumerate(weights)) - grown * above(x, 0)
    x = cross(1 / grown)
    added = mpmath.mpf(0)
    if x is not None:
        added = 1 - above(x, 0) - grown * (1 - mpmath.fsum(w * above(x, j) for j, w in enumerate(weights)))
    return float(removed), float(added)


@pytest.mark.parametrize(("size", "rate", "sigma", "epsilon"), CASES)
def test_one_step_is_the_integral(size: int, rate: float, sigma: float, epsilon: float) -> None:
    exact = max(hockey_sticks(size, rate, sigma, epsilon))
    found = get_delta(PoissonEvent(rate, GaussianEvent(sigma)), epsilon, group_size=size)
    assert exact <= found <= exact * 1.02 + 1e-9


@pytest.mark.parametrize("size", [2, 3])
def test_records_that_point_apart_tell_less(size: int) -> None:
    """Integrates in the plane, for records in other directions, shorter ones, and one against another."""
    rate, sigma, epsilon = 0.4, 0.9, 0.4
    axis = np.linspace(-9.0, 9.0, 361)
    x, y = np.meshgrid(axis, axis, indexing="ij")
    area = (axis[1] - axis[0]) ** 2

    def density(shift: np.ndarray) -> np.ndarray:
        return np.exp(-((x - shift[0]) ** 2 + (y - shift[1]) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)

    def deltas(vectors: list[np.ndarray]) -> tuple[float, float]:
        with_group = np.zeros_like(x)
        for chosen in itertools.product([0, 1], repeat=len(vectors)):
            weight = math.prod(rate if c else 1 - rate for c in chosen)
            with_group += weight * density(sum((c * v for c, v in zip(chosen, vectors, strict=True)), np.zeros(2)))
        without = density(np.zeros(2))
        there, back = with_group - math.exp(epsilon) * without, without - math.exp(epsilon) * with_group
        return float(np.maximum(there, 0).sum() * area), float(np.maximum(back, 0).sum() * area)

    unit = [np.array([math.cos(a), math.sin(a)]) for a in (0.0, math.pi / 3, math.pi / 2, math.pi)]
    worst = deltas([unit[0]] * size)
    assert worst == pytest.approx(hockey_sticks(size, rate, sigma, epsilon), abs=1e-4)
    for others in itertools.product([*unit[1:], 0.5 * unit[0]], repeat=size - 1):
        removed, added = deltas([unit[0], *others])
        assert removed < worst[0]
        assert added < worst[1]


@pytest.mark.parametrize(("size", "share"), [(2, 0.95), (4, 0.75)])
def test_the_mixture_is_below_what_any_mechanism_has_for_groups(size: int, share: float) -> None:
    """(ε, δ) for one is (kε, δ (e^kε - 1) / (e^ε - 1)) for k: Vadhan, The Complexity of Differential Privacy, 2017."""
    run, delta = SelfComposedEvent(PoissonEvent(0.01, GaussianEvent(1.0)), 1000), 1e-5
    allowed = []  # the ε of a group of all pairs (ε, δ) of one record, where they say something
    for log_delta in range(-34, -10, 4):
        epsilon = get_epsilon(run, math.exp(log_delta))
        grown = log_delta + math.log(math.expm1(size * epsilon) / math.expm1(epsilon))
        allowed += [size * epsilon] if grown <= math.log(delta) else []
    assert get_epsilon(run, delta, group_size=size) < share * min(allowed)
