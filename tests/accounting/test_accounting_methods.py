"""Which bound an answer is: the least of two, and it says which; the curve; what an accountant of one kind reports."""

from __future__ import annotations

import pytest
from accounting_oracles import poisson

from privet.accounting import GdpAccountant, PldAccountant, RdpAccountant


def test_pld_reports_its_own_bound_where_that_is_the_least() -> None:
    event = poisson(1.0, 0.01, 1000)
    bound = PldAccountant().epsilon_bounds(event, 1e-5)
    assert bound.method == "pld"
    assert bound.lower <= bound.upper < RdpAccountant().epsilon(event, 1e-5)


def test_pld_reports_renyis_bound_where_that_is_the_least_and_says_so() -> None:
    event = poisson(0.3, 0.01, 10**8)
    bound = PldAccountant().epsilon_bounds(event, 1e-5)
    assert bound.method == "rdp"
    assert bound.upper == RdpAccountant().epsilon(event, 1e-5)
    assert bound.lower <= bound.upper


@pytest.mark.parametrize("accountant", [PldAccountant, RdpAccountant, GdpAccountant])
def test_the_curve_is_epsilon_at_every_delta(accountant: type) -> None:
    event, deltas = poisson(1.0, 0.01, 100), (1e-9, 1e-6, 1e-3)
    curve = accountant().curve(event, deltas)
    assert curve == pytest.approx([accountant().epsilon(event, delta) for delta in deltas], rel=1e-3)
    assert list(curve) == sorted(curve, reverse=True)


def test_the_other_accountants_report_their_own_bound() -> None:
    event = poisson(1.0, 0.01, 1000)
    assert RdpAccountant().epsilon_bounds(event, 1e-5).method == "rdp"
    assert GdpAccountant().epsilon_bounds(event, 1e-5).method == "gdp"
