"""Calibration: within the target, next to what is not, and honest where no answer exists."""

from __future__ import annotations

import math

import pytest
from accounting_oracles import fixed, poisson, truncated
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.accounting import (
    ClipCountEvent,
    ComposedEvent,
    GaussianEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    calibrate_count_noise,
    calibrate_noise_multiplier,
    calibrate_rate,
    calibrate_steps,
    get_epsilon,
)
from privet.errors import AccountingError, ConfigurationError


def check(found, event_of, relation=Relation.ADD_OR_REMOVE_ONE):
    assert found.epsilon <= found.target_epsilon < found.epsilon_outside
    assert get_epsilon(event_of(found.value), found.delta, relation=relation) <= found.target_epsilon * (1 + 1e-6)
    assert get_epsilon(event_of(found.outside), found.delta, relation=relation) > found.target_epsilon * (1 - 1e-6)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.3, 20.0), st.floats(1e-3, 0.5), st.integers(1, 3000), st.floats(-9, -3))
def test_the_least_noise(epsilon, rate, steps, exponent):
    def event_of(sigma):
        return poisson(sigma, rate, steps)

    found = calibrate_noise_multiplier(epsilon, 10.0**exponent, event_of)
    check(found, event_of)
    assert found.outside == pytest.approx(found.value, rel=2e-5)


@pytest.mark.parametrize(
    ("event_of", "relation"),
    [
        (lambda sigma: fixed(sigma, 50, 5000, 100), Relation.REPLACE_ONE),
        (lambda sigma: truncated(600, sigma=sigma, steps=100), Relation.ZERO_OUT),
        (lambda sigma: PartitionEvent(3, GaussianEvent(sigma)), Relation.ZERO_OUT),
        (
            lambda sigma: ComposedEvent((poisson(sigma, 0.01, 300), poisson(2 * sigma, 0.02, 300))),
            Relation.ADD_OR_REMOVE_ONE,
        ),
    ],
)
def test_every_sampler_and_schedules(event_of, relation):
    found = calibrate_noise_multiplier(2.0, 1e-6, event_of, relation=relation)
    check(found, event_of, relation)


def test_the_gaussian_has_the_analytic_answer():
    found = calibrate_noise_multiplier(1.0, 1e-5, GaussianEvent)
    assert found.value == pytest.approx(3.7306316, rel=2e-5)
    assert found.value >= 3.7306316


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_most_steps(accountant):
    def event_of(steps):
        return poisson(1.0, 0.01, steps)

    found = calibrate_steps(3.0, 1e-5, event_of, accountant=accountant)
    assert found.value == int(found.value)
    assert found.outside == found.value + 1
    assert found.epsilon <= 3.0 < found.epsilon_outside


def test_steps_at_the_ends():
    none = calibrate_steps(0.1, 1e-5, lambda steps: SelfComposedEvent(GaussianEvent(0.5), steps))
    assert (none.value, none.epsilon, none.outside) == (0, 0.0, 1)
    every = calibrate_steps(1.0, 1e-5, lambda steps: SelfComposedEvent(GaussianEvent(1e9), steps), most=1000)
    assert (every.value, every.outside) == (1000, None)
    with pytest.raises(AccountingError, match="before the first step"):
        calibrate_steps(1.0, 1e-5, lambda steps: NonPrivateEvent())


def test_the_greatest_rate():
    def event_of(rate):
        return poisson(1.0, rate, 500)

    check(calibrate_rate(2.0, 1e-5, event_of), event_of)
    every = calibrate_rate(50.0, 1e-5, lambda rate: PoissonEvent(rate, GaussianEvent(1.0)))
    assert (every.value, every.outside) == (1.0, None)


def test_the_least_noise_on_the_count():
    def event_of(noise):
        return SelfComposedEvent(PoissonEvent(0.01, ClipCountEvent(1.0, noise)), 1000)

    check(calibrate_count_noise(1.9, 1e-5, event_of), event_of)


def test_targets_out_of_reach_raise():
    with pytest.raises(AccountingError, match="No noise reaches"):
        calibrate_noise_multiplier(
            1.0, 1e-5, lambda sigma: ComposedEvent((GaussianEvent(sigma), GaussianEvent(0.5))), accountant="rdp"
        )
    with pytest.raises(AccountingError, match="No noise reaches"):
        calibrate_noise_multiplier(1.0, 0.0, GaussianEvent)
    with pytest.raises(AccountingError, match="No rate reaches"):
        calibrate_rate(
            0.5, 1e-5, lambda rate: ComposedEvent((PoissonEvent(rate, GaussianEvent(1.0)), GaussianEvent(1.0)))
        )


@pytest.mark.parametrize(
    ("epsilon", "delta", "message"),
    [(-1.0, 1e-5, "target_epsilon"), (math.nan, 1e-5, "target_epsilon"), (1.0, 1.5, "delta")],
)
def test_bad_targets_are_refused(epsilon, delta, message):
    with pytest.raises(ConfigurationError, match=message):
        calibrate_noise_multiplier(epsilon, delta, GaussianEvent)


def test_the_event_must_be_a_function():
    with pytest.raises(ConfigurationError, match="as a function of the number sought"):
        calibrate_noise_multiplier(1.0, 1e-5, GaussianEvent(1.0))
