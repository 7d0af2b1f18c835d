"""Claims that were once wrong, each with the comparison that shows it. The truth is the oracle's, computed here."""

from __future__ import annotations

import math

import oracle
import pytest
from accounting_oracles import fixed, poisson
from oracle_checks import check_claim, check_delta, check_lower, check_upper
from oracle_contour import patience

from privet.accounting import (
    ComposedEvent,
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PldAccountant,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
    get_delta,
    get_epsilon,
)
from privet.errors import PrivetError

ADD, REPLACE, ZERO = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE, Relation.ZERO_OUT
ONE = GaussianEvent(1.0)


def claimed(event, delta, relation):
    """Returns the ε claimed; infinity where the accountant refuses to answer."""
    try:
        return get_epsilon(event, delta, relation=relation)
    except PrivetError:
        return math.inf


class TestTheAnswerLiesBelowTheWindow:
    @pytest.mark.parametrize("relation", [ADD, REPLACE])
    def test_fixed_size_at_little_noise(self, relation):
        check_upper(fixed(0.8, 300, 1000, 40), claimed(fixed(0.8, 300, 1000, 40), 1e-6, relation), 1e-6, relation)

    def test_fixed_size_at_the_smallest_epsilon_seen(self):
        event = fixed(0.5166, 3, 1000, 20)
        check_upper(event, claimed(event, 0.0076, REPLACE), 0.0076, REPLACE)

    def test_delta_of_fixed_size_where_all_losses_are_larger(self):
        event = fixed(0.8, 300, 1000, 40)
        assert get_delta(event, 1.0, relation=REPLACE) >= oracle.delta(event, 1.0, REPLACE).low * (1 - 1e-6)

    def test_a_ledger_of_twenty_slightly_different_noises(self):
        steps = [SelfComposedEvent(PoissonEvent(0.5, GaussianEvent(0.6 * (1 + 1e-4 * i))), 10) for i in range(20)]
        check_upper(ComposedEvent(tuple(steps)), get_epsilon(ComposedEvent(tuple(steps)), 1e-6), 1e-6)

    def test_a_schedule_of_thirty_noises_costs_at_least_its_largest(self):
        steps = [SelfComposedEvent(PoissonEvent(0.1, GaussianEvent(0.6 * 0.9999**i)), 100) for i in range(30)]
        found = get_epsilon(ComposedEvent(tuple(steps)), 1e-6)
        assert found >= PldAccountant().epsilon_bounds(poisson(0.6, 0.1, 3000), 1e-6).lower

    def test_truncated_poisson_under_zero_out(self):
        event = SelfComposedEvent(TruncatedPoissonEvent(0.1, 50, 1000, GaussianEvent(0.6)), 200)
        check_upper(event, claimed(event, 1e-6, ZERO), 1e-6, ZERO)


class TestWhoIsInAFullBatch:
    """Under add-or-remove-one, a batch of fixed size and a cut one have another record in the place."""

    def test_a_partition_of_a_batch_of_fixed_size(self):
        event = FixedSizeEvent(99, 100, PartitionEvent(1, ONE))
        check_upper(event, claimed(event, 1e-5, ADD), 1e-5)

    def test_a_poisson_batch_of_a_cut_one(self):
        around_the_gaussian = TruncatedPoissonEvent(0.99, 50, 100, ONE)
        check_upper(around_the_gaussian, claimed(around_the_gaussian, 1e-5, ADD), 1e-5)
        # Inside, each of the 50 joins with probability 0.99; test_accounting_brute_force enumerates it.
        nested = TruncatedPoissonEvent(0.99, 50, 100, PoissonEvent(0.99, ONE))
        assert claimed(nested, 1e-5, ADD) >= 7.0

    def test_a_batch_of_all_records_beside_one_more_record(self):
        event = FixedSizeEvent(100, 100, ONE)
        check_upper(event, claimed(event, 1e-5, ADD), 1e-5)


RARE = [  # σ, q, T, δ, and an ε at which the true δ is smaller
    (0.5, 1e-6, 1_000_000, 1e-6, 0.0654),
    (0.5, 1e-6, 100_000, 1e-6, 0.0225),
    (1.4236, 4.3e-5, 1, 1.05e-12, 0.00188),
    (0.485, 1.48e-6, 103_417, 5.8e-8, 0.1836),
    (0.8, 1e-5, 1, 1e-12, 0.00974),
    (0.7, 1e-5, 100_000, 1e-8, 0.0659),
    (0.7, 1e-4, 10_000, 1e-6, 0.1623),
]


class TestRareHeavyLosses:
    @pytest.mark.parametrize("row", RARE, ids=str)
    def test_are_not_far_above_what_is_valid(self, row):
        sigma, rate, steps, delta, valid = row
        assert get_epsilon(poisson(sigma, rate, steps), delta) <= valid * 1.01

    @pytest.mark.deep
    @pytest.mark.parametrize("row", RARE, ids=str)
    def test_are_not_below_the_truth(self, row):
        sigma, rate, steps, delta, _ = row
        with patience(4e9):
            check_claim(poisson(sigma, rate, steps), delta, within=0.01)

    def test_delta_is_not_far_above_what_is_valid(self):
        assert get_delta(poisson(0.485, 1.48e-6, 103_417), 0.18) <= 6.5e-8

    def test_more_steps_cost_more(self):
        found = [get_epsilon(poisson(0.7, 1e-6, steps), 1e-8) for steps in (30_000, 100_000, 300_000)]
        assert found == sorted(found)

    def test_one_more_release_costs_more(self):
        event = poisson(0.7, 1e-6, 100_000)
        alone = get_epsilon(event, 1e-8)
        assert get_epsilon(ComposedEvent((event, GaussianEvent(300.0))), 1e-8) >= alone * (1 - 1e-9)

    def test_a_little_more_noise_costs_a_little_less(self):
        found = [get_epsilon(poisson(sigma, 1e-5, 100_000), 1e-8) for sigma in (0.70, 0.71, 0.72)]
        assert found == sorted(found, reverse=True)
        assert found[-1] >= 0.6 * found[0]

    def test_the_lower_bound_says_something(self):
        bound = PldAccountant().epsilon_bounds(poisson(0.7, 1e-4, 10_000), 1e-6)
        assert bound.lower >= 0.9 * bound.upper


class TestFixedSizeUnderZeroOut:
    @pytest.mark.parametrize("batch_size", [30, 50, 99, 100])
    def test_costs_no_more_than_without_sampling(self, batch_size):
        unsampled = get_epsilon(SelfComposedEvent(ONE, 10), 1e-5, relation=ZERO)
        assert get_epsilon(fixed(1.0, batch_size, 100, 10), 1e-5, relation=ZERO) <= unsampled * (1 + 1e-6)

    def test_truncated_poisson_costs_no_more_than_without_sampling(self):
        event = SelfComposedEvent(TruncatedPoissonEvent(0.9, 50, 100, ONE), 10)
        unsampled = get_epsilon(SelfComposedEvent(ONE, 10), 1e-5, relation=ZERO)
        assert get_epsilon(event, 1e-5, relation=ZERO) <= unsampled * (1 + 1e-6)

    @pytest.mark.parametrize("batch_size", [30, 99])
    def test_is_neither_below_what_is_reached_nor_its_lower_bound_above_what_is_proven(self, batch_size):
        check_claim(fixed(1.0, batch_size, 100, 10), 1e-5, ZERO)


class TestLowerBounds:
    def test_no_lower_bound_comes_from_where_weights_overflow(self):
        event = PoissonEvent(0.3, GaussianEvent(1e-4))
        bound = PldAccountant().epsilon_bounds(event, 0.31)  # δ > q: nothing is lost at ε = 0
        assert bound.lower == 0.0
        check_lower(event, bound.lower, 0.31)

    @pytest.mark.parametrize("sigma", [1e-3, 0.02, 0.1])
    @pytest.mark.parametrize("delta", [0.29, 0.31, 1e-3])
    def test_at_very_little_noise(self, sigma, delta):
        check_claim(PoissonEvent(0.3, GaussianEvent(sigma)), delta)


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (PoissonEvent(0.01, GaussianEvent(1e300)), 1e-5),
        (SelfComposedEvent(PoissonEvent(0.01, GaussianEvent(1e300)), 1000), 1e-5),
        (PoissonEvent(0.7, GaussianEvent(1e-100)), 0.6),
        (PoissonEvent(0.5, GaussianEvent(1e-100)), 0.6),
        (poisson(1e-100, 0.01, 10), 0.6),
    ],
    ids=str,
)
def test_extreme_noise_has_a_right_answer_or_a_named_error(event, delta):
    try:
        bound = PldAccountant().epsilon_bounds(event, delta)
    except PrivetError:
        return
    inner = event.event if isinstance(event, SelfComposedEvent) else event
    steps = event.count if isinstance(event, SelfComposedEvent) else 1
    # With σ = 1e300 nothing is told; with σ = 1e-100 the record is told whenever it is drawn.
    told = 0.0 if inner.event.noise_multiplier > 1.0 else 1.0 - (1.0 - inner.rate) ** steps
    if told <= delta:
        assert bound.lower == 0.0
        assert bound.upper <= 1e-3 or math.isinf(bound.upper)
    else:
        assert bound.upper >= 1e100


def test_delta_at_the_claimed_epsilon_agrees_with_the_oracle():
    for event, epsilon, relation in [
        (poisson(1.0, 0.01, 1000), 1.82824, ADD),
        (poisson(1.0, 0.01, 1000), 2.84345, REPLACE),
        (fixed(2.0, 500, 50_000, 1000), 2.1989, REPLACE),
    ]:
        check_delta(event, epsilon, relation)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "gdp"])
@pytest.mark.parametrize(
    "event",
    [
        PoissonEvent(0.01, GaussianEvent(1e-100)),
        PoissonEvent(0.01, GaussianEvent(1e300)),
        PoissonEvent(1e-300, GaussianEvent(1.0)),
        GaussianEvent(1e-100),
        GaussianEvent(1e300),
    ],
    ids=str,
)
def test_extreme_numbers_have_an_answer_by_every_accountant(accountant, event):
    """No bare OverflowError: a number that falls with δ, 0 where δ is above the total variation."""
    found = [get_epsilon(event, delta, accountant=accountant) for delta in (1e-12, 1e-5, 0.6)]
    assert found == sorted(found, reverse=True)
    assert all(0.0 <= each < math.inf for each in found)
    assert 0.0 <= get_delta(event, 1.0, accountant=accountant) <= 1.0


def test_what_is_drawn_with_a_small_probability_discloses_with_that_probability():
    event = PoissonEvent(0.01, GaussianEvent(1e-100))
    assert get_delta(event, 1.0) == pytest.approx(0.01)
    assert get_epsilon(event, 0.6) == 0.0
