"""Rényi divergences against 40-digit quadrature, and the laws they obey."""

from __future__ import annotations

import mpmath as mp
import numpy as np
import pytest
from accounting_oracles import RENYI, renyi_by_quadrature

from privet.accounting.renyi import mixture_cumulant, pair_cumulant, symmetric_cumulant
from privet.accounting.terms import Pair, Part


def divergence(rate, sigma, order):
    return float(mixture_cumulant(np.array([rate]), np.array([sigma]), order)[0]) / (order - 1.0)


@pytest.mark.parametrize(("rate", "sigma", "order", "value"), RENYI)
def test_divergences_of_the_table(rate, sigma, order, value):
    assert divergence(rate, sigma, order) == pytest.approx(value, rel=2e-9)


@pytest.mark.parametrize(
    ("rate", "sigma", "order"),
    [(0.3, 2.0, 1.05), (0.3, 0.6, 1.5), (0.5, 1.0, 2.3), (0.9, 1.5, 3.5), (0.2, 5.0, 40.5), (1e-4, 0.8, 6.25)],
)
def test_divergences_are_quadratures_rounded_up(rate, sigma, order):
    exact = renyi_by_quadrature(rate, sigma, order)
    found = divergence(rate, sigma, order)
    assert exact * (1 - 1e-12) <= found <= exact * (1 + 2e-9)
    part = Part(Pair.MIXTURE, rate, sigma)
    assert exact * (1 - 1e-12) <= pair_cumulant(part, order) / (order - 1.0) <= exact * (1 + 2e-9)


def test_divergence_grows_with_the_order_and_its_cumulant_is_convex():
    orders = np.concatenate([np.linspace(1.05, 6.0, 60), np.linspace(6.25, 40.0, 60)])
    for rate, sigma in [(0.01, 1.0), (0.1, 3.0), (0.001, 0.5)]:
        values = np.array([divergence(rate, sigma, order) for order in orders])
        assert (np.diff(values) >= -1e-9 * values[1:]).all()
        slopes = np.diff((orders - 1.0) * values) / np.diff(orders)
        assert (np.diff(slopes) >= -1e-6 * np.abs(slopes[1:])).all()


@pytest.mark.parametrize(
    ("sigma", "order", "published"),
    [
        (1.0, 2, 5.435086e-4),
        (1.0, 3, 8.348727e-4),
        (1.0, 4, 1.141607e-3),
        (1.0, 8, 2.684165e-3),
        (1.0, 16, 3.134061),
        (4.0, 2, 2.579745e-5),
        (4.0, 8, 1.042207e-4),
        (4.0, 64, 8.951184e-4),
    ],
)
def test_sampling_without_replacement_is_at_most_the_published_bound(sigma, order, published):
    """Wang, Balle and Kasiviswanathan, arXiv 1808.00087, theorem 27, bounds what is computed exactly here."""
    assert symmetric_cumulant(0.01, sigma, order) / (order - 1) <= published * (1 + 1e-6)


@pytest.mark.parametrize(
    ("rate", "sigma", "order"), [(0.01, 1.0, 2.0), (0.3, 0.7, 3.5), (0.5, 2.0, 1.3), (1e-4, 0.5, 8.0), (0.9, 1.0, 20.0)]
)
def test_the_symmetrised_profile_against_many_digits(rate, sigma, order):
    with mp.workdps(40):
        q, s, a = mp.mpf(rate), mp.mpf(sigma), mp.mpf(order) - 1

        def density(x):
            return mp.exp(-(x**2) / (2 * s**2)) / (s * mp.sqrt(2 * mp.pi))

        def ratio(x):
            return 1 - q + q * mp.exp((2 * x - 1) / (2 * s**2))

        half = mp.mpf(1) / 2
        points = [half, 1, 1 + s, order, order + 4 * s, order + 12 * s, order + 40 * s]
        p_part = mp.quad(lambda x: density(x) * ratio(x) ** (a + 1), points)
        q_part = mp.quad(lambda x: density(x) * ratio(x) ** (-a), points)
        rest = 1 - mp.quad(lambda x: density(x) * (ratio(x) + 1), points)
        exact = float(mp.log(p_part + q_part + rest))
    found = symmetric_cumulant(rate, sigma, order)
    assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-8)


def test_a_group_of_one_is_the_mixture():
    for order in (1.5, 2.0, 7.3):
        one = pair_cumulant(Part(Pair.GROUP, 0.05, 1.3, 1), order)
        assert one == pytest.approx(pair_cumulant(Part(Pair.MIXTURE, 0.05, 1.3), order), rel=1e-8)
