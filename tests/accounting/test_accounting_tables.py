"""ε and σ against published tables."""

from __future__ import annotations

import math

import pytest
from accounting_oracles import AMPLIFICATION, CALIBRATION, TABLE, check_table, poisson, truncated

from privet.accounting import (
    GaussianEvent,
    PartitionEvent,
    PldAccountant,
    Relation,
    calibrate_noise_multiplier,
    get_epsilon,
)
from privet.accounting.goal import Goal, Place
from privet.accounting.moments import laws
from privet.accounting.planning import grid_for
from privet.accounting.terms import Pair, Part, Term, reduce_event


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[2].value}-{row[3]}")
def test_epsilon_is_the_tables(row):
    check_table([row])


@pytest.mark.parametrize(("sigma", "batches", "delta", "plain", "amplified"), AMPLIFICATION)
def test_one_epoch_with_and_without_amplification(sigma, batches, delta, plain, amplified):
    # The tables give three or four digits.
    assert get_epsilon(PartitionEvent(1, GaussianEvent(sigma)), delta) == pytest.approx(plain, rel=1e-3)
    assert get_epsilon(poisson(sigma, 1 / batches, batches), delta) == pytest.approx(amplified, rel=1e-3)


@pytest.mark.parametrize(("epsilon", "rate", "steps", "delta", "by_pld", "by_rdp"), CALIBRATION)
def test_least_noise_is_the_tables(epsilon, rate, steps, delta, by_pld, by_rdp):  # noqa: PLR0917  one row
    found = calibrate_noise_multiplier(epsilon, delta, lambda sigma: poisson(sigma, rate, steps))
    assert found.value == pytest.approx(by_pld, rel=1e-3)
    assert found.epsilon <= epsilon < found.epsilon_outside
    if by_rdp is not None:
        quick = calibrate_noise_multiplier(epsilon, delta, lambda sigma: poisson(sigma, rate, steps), accountant="rdp")
        assert found.value < quick.value <= by_rdp * (1 + 1e-3)


@pytest.mark.parametrize(("group_size", "value"), [(1, 1.8282), (2, 3.9791), (5, 11.6380)])
def test_groups_by_a_mixture(group_size, value):
    assert get_epsilon(poisson(1.0, 0.01, 1000), 1e-5, group_size=group_size) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(("cap", "value"), [(500, 11.088), (520, 8.0715), (550, 4.8357), (566, 3.6362), (588, 1.93195)])
def test_low_caps_are_tighter_than_the_tables_pair_which_the_same_code_reproduces(cap, value):
    """The table uses a looser pair where the batch is full: a shift of 4 between the two mixtures (decision 0013)."""
    delta = 1e-5
    assert get_epsilon(truncated(cap), delta, relation=Relation.ZERO_OUT) < value
    ((term, count),) = reduce_event(truncated(cap), relation=Relation.ZERO_OUT).terms.items()
    (weight, full), rest = term.parts
    assert full.pair is Pair.SYMMETRIC
    loose = {Term(((weight, Part(Pair.REPLACE, full.rate, full.noise_multiplier / 2)), rest)): count}
    both = laws(loose, delta * 1e-4 / count)
    places = tuple(Place(tilt, epsilon, tilt) for epsilon, tilt in (law.epsilon(delta) for law in both))
    answers = grid_for(loose, both, Goal(math.log(delta), places, 1e-4)).answers(loose, delta)
    assert all(answer.inside for answer in answers)
    assert max(answer.epsilon for answer in answers) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("delta", "low", "high"),
    [(1e-6, 2.124, 2.126), (1e-8, 2.697, 2.699), (1e-10, 3.290, 3.292), (1e-12, 3.90, 3.917), (1e-14, 4.4, 4.976)],
)
def test_small_deltas_keep_their_digits(delta, low, high):
    assert low <= PldAccountant().epsilon(poisson(1.0, 0.01, 1000), delta) <= high


def test_hard_cases_of_the_brief():
    assert get_epsilon(poisson(0.3, 0.2, 1000), 1e-5) == pytest.approx(1018, rel=2e-3)
    assert get_epsilon(poisson(1.0, 1e-5, 10**6), 1e-5) == pytest.approx(0.037, rel=0.02)
