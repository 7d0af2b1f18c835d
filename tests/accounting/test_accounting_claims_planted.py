"""What an accountant with a bug would claim does not pass the checks: each class of error beside the right answer.

Nothing here depends on how an engine works inside: the claims of a wrong engine are made from the oracle's own parts.
"""

from __future__ import annotations

import oracle
import oracle_contour
import pytest
from accounting_oracles import fixed, poisson
from oracle_checks import check_claim, check_delta, check_lower, check_upper
from oracle_contour import Composition, one_direction, patience
from oracle_reduction import floors

from privet.accounting import Accountant, FixedSizeEvent, GaussianEvent, PartitionEvent, PoissonEvent, Relation
from privet.accounting.accountant import Bound

ADD, REPLACE = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE
EVENT, DELTA, TRUTH = poisson(1.0, 0.01, 1000), 1e-5, 1.82823
ONE = GaussianEvent(1.0)


class Says(Accountant):
    """An accountant that claims what it is told to."""

    name = "says"

    def __init__(self, upper, lower=0.0):
        self.upper, self.lower = upper, lower

    def bound_epsilon(self, event, delta, *, relation, group_size, lower):
        return Bound(self.upper, self.lower, self.name)

    def bound_delta(self, event, epsilon, *, relation, group_size, lower):
        return Bound(self.upper, self.lower, self.name)


def fails(check, *given, **named):
    with pytest.raises(AssertionError):
        check(*given, **named)


def root(delta_at, delta, low=0.0, high=300.0):
    for _ in range(18):
        middle = (low + high) / 2.0
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def test_the_right_claim_passes_and_its_looseness_is_told():
    assert check_claim(EVENT, DELTA, accountant=Says(TRUTH * 1.002, TRUTH * 0.99), within=0.01) == pytest.approx(
        2e-3, 0.05
    )
    check_delta(EVENT, TRUTH, accountant=Says(1.01e-5, 0.99e-5))


@pytest.mark.parametrize("factor", [0.9, 0.99, 0.999])
def test_too_small_by_a_thousandth_is_seen(factor):
    fails(check_claim, EVENT, DELTA, accountant=Says(TRUTH * factor))


def test_too_large_by_two_percent_is_seen_where_tightness_is_asked():
    fails(check_claim, EVENT, DELTA, accountant=Says(TRUTH * 1.02), within=0.01)
    check_claim(EVENT, DELTA, accountant=Says(TRUTH * 1.02))


def test_a_lower_bound_that_is_too_large_is_seen():
    fails(check_claim, EVENT, DELTA, accountant=Says(TRUTH * 1.005, TRUTH * 1.004))


def test_delta_too_small_and_its_lower_bound_too_large_are_seen():
    fails(check_delta, EVENT, TRUTH, accountant=Says(0.99e-5))
    fails(check_delta, EVENT, TRUTH, accountant=Says(2e-5, 1.01e-5))


def test_mass_below_the_window_dropped():
    """The window starts above the answer, so the curve reads as nothing below it."""
    fails(check_upper, fixed(0.8, 300, 1000, 40), 0.0, 1e-6, REPLACE)
    fails(check_upper, EVENT, 0.0, DELTA)


def test_the_inner_relation_not_passed_on():
    inner_alone = oracle.epsilon(PartitionEvent(1, ONE), DELTA, ADD).high
    fails(check_upper, FixedSizeEvent(99, 100, PartitionEvent(1, ONE)), inner_alone, DELTA, ADD)


@pytest.mark.parametrize("event", [EVENT, poisson(0.7, 0.3, 20)], ids=str)
def test_one_direction_only(event):
    (pair,) = floors(event, ADD, 1)
    small = root(lambda e: one_direction(pair.reversed(), e)[1], DELTA, high=20.0)
    fails(check_upper, event, small, DELTA)


def test_the_maximum_of_two_directions_where_the_relation_lets_them_alternate():
    """Fixed size under replace-one: the composed profile is more than either direction composed on its own."""
    event = fixed(1.0, 500, 50_000, 1000)
    found = oracle.delta(event, 14.8207, REPLACE)
    assert found.high == pytest.approx(1e-5, rel=2e-3)
    assert found.low < 0.5 * found.high


def test_a_sensitivity_of_one_under_replace_one():
    fails(check_upper, ONE, oracle.epsilon(ONE, DELTA, ADD).high, DELTA, REPLACE)


def test_a_step_forgotten():
    (pair,) = floors(EVENT, ADD, 1)
    fewer = Composition(0.0, tuple((step, count - 5) for step, count in pair.steps))
    fails(check_upper, EVENT, root(lambda e: one_direction(fewer, e)[1], DELTA, high=20.0), DELTA)


def test_the_last_grid_instead_of_the_best():
    """Rare heavy losses: what a coarse grid said, 9 % too much, and a lower bound of nothing."""
    with patience(4e9):
        fails(check_claim, poisson(0.7, 1e-4, 10_000), 1e-6, accountant=Says(0.1770), within=0.01)


def test_a_lower_bound_from_where_weights_overflow():
    fails(check_lower, PoissonEvent(0.3, GaussianEvent(1e-4)), 50_010_563.0, 0.31)


def test_an_integral_that_does_not_settle_says_nothing(monkeypatch):
    monkeypatch.setattr(oracle_contour, "WORK", [1.0])
    found = oracle.delta(EVENT, TRUTH)
    assert (found.low, found.high, found.decided) == (0.0, 1.0, False)
