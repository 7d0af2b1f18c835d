"""Rényi divergences against 40-digit quadrature, and the laws they obey."""

from __future__ import annotations

import numpy as np
import pytest
from accounting_oracles import RENYI, renyi_by_quadrature

from privet.accounting.renyi import fixed_size_cumulant, mixture_cumulant, pair_cumulant
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
    ("sigma", "order", "value"),
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
def test_sampling_without_replacement(sigma, order, value):
    assert fixed_size_cumulant(0.01, sigma, order) / (order - 1) == pytest.approx(value, rel=1e-6)


def test_a_group_of_one_is_the_mixture():
    for order in (1.5, 2.0, 7.3):
        one = pair_cumulant(Part(Pair.GROUP, 0.05, 1.3, 1), order)
        assert one == pytest.approx(pair_cumulant(Part(Pair.MIXTURE, 0.05, 1.3), order), rel=1e-8)
