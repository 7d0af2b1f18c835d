"""Bounds from counted errors and guesses: published values, a slow twin, and what must not be refuted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp

from privet.accounting.gaussian import gaussian_epsilon
from privet.audit import Errors, Guesses
from privet.audit.intervals import upper_rate
from privet.errors import ConfigurationError


@pytest.mark.parametrize(
    ("counts", "pure", "approximate"),
    [
        ((1000, 1000, 600), 0.29747, 0.29723),
        ((1000, 1000, 700), 0.73201, 0.73174),
        ((1000, 100, 100), 3.49297, 3.46538),
        ((1000, 100, 95), 2.17243, 2.16518),
        ((10000, 1000, 1000), 5.80907, 5.52935),
        ((5000, 200, 190), 2.39787, 2.37599),
        ((1000, 1000, 500), 0.0, 0.0),
    ],
)
def test_one_run(counts, pure, approximate):
    assert Guesses(*counts).epsilon(0.0) == pytest.approx(pure, abs=1e-5)
    assert Guesses(*counts).epsilon(1e-5) == pytest.approx(approximate, abs=1e-5)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1000, 100, 100), 5.54903),
        ((1000, 100, 95), 3.32330),
        ((1000, 1000, 600), 0.58354),
        ((10000, 1000, 1000), 8.98774),
    ],
)
def test_one_run_of_a_gaussian(counts, expected):
    assert Guesses(*counts).gaussian_epsilon(1e-5) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("trials", "false_positives", "false_negatives", "epsilon", "mu"),
    [
        (1000, 0, 0, 5.60058, 5.35982),
        (1000, 10, 300, 3.60044, 2.53130),
        (100, 0, 0, 3.28134, None),
        (10000, 0, 0, 7.90482, None),
    ],
)
def test_many_runs(trials, false_positives, false_negatives, epsilon, mu):
    errors = Errors(false_positives=false_positives, absent=trials, false_negatives=false_negatives, present=trials)
    assert errors.epsilon(1e-5) == pytest.approx(epsilon, abs=1e-5)
    if mu is not None:
        assert errors.mu() == pytest.approx(mu, abs=1e-5)
        assert errors.gaussian_epsilon(1e-5) == gaussian_epsilon(errors.mu(), 1e-5)


@given(st.integers(1, 60), st.data())
def test_a_rate_is_bounded_as_the_binomial_law_says(trials, data):
    errors = data.draw(st.integers(0, trials))
    significance = data.draw(st.floats(1e-6, 0.4))
    bound = upper_rate(errors, trials, significance)
    if errors == trials:
        assert bound == 1.0
        return
    with mp.workdps(40):  # the rate at which so few errors have just this probability
        at_most = sum(
            mp.binomial(trials, k) * mp.mpf(bound) ** k * (1 - mp.mpf(bound)) ** (trials - k) for k in range(errors + 1)
        )
    assert float(at_most) == pytest.approx(significance, rel=1e-6)


@given(st.integers(1, 40), st.data())
def test_the_p_value_of_one_run_is_its_formula(canaries, data):
    guesses = data.draw(st.integers(1, canaries))
    correct = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(st.floats(0.0, 8.0)), data.draw(st.floats(0.0, 0.01))
    with mp.workdps(40):
        q = mp.exp(epsilon) / (1 + mp.exp(epsilon))
        law = [mp.binomial(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
        beta = sum(law[correct:])
        alpha = max(((sum(law[max(correct - i, 0) :]) - beta) / i for i in range(1, correct + 1)), default=mp.mpf(0))
        expected = min(1, beta + 2 * canaries * delta * alpha)
    found = Guesses(canaries, guesses, correct).p_value(epsilon, delta)
    assert found == pytest.approx(float(expected), rel=1e-9)


@given(st.integers(2, 200), st.data())
def test_more_right_guesses_and_less_confidence_refute_more(canaries, data):
    guesses = data.draw(st.integers(1, canaries))
    correct = data.draw(st.integers(0, guesses - 1))
    fewer, more = Guesses(canaries, guesses, correct), Guesses(canaries, guesses, correct + 1)
    assert fewer.epsilon(1e-5) <= more.epsilon(1e-5)
    assert fewer.gaussian_epsilon(1e-5) <= more.gaussian_epsilon(1e-5) + 1e-9
    assert fewer.epsilon(1e-5, confidence=0.99) <= fewer.epsilon(1e-5, confidence=0.9)
    assert fewer.epsilon(1e-5, tries=10) <= fewer.epsilon(1e-5)


def test_randomized_response_is_refuted_no_more_often_than_allowed():
    # The law that the bound is tight for: each coin is told right with probability e^ε / (1 + e^ε).
    rng = np.random.default_rng(0)
    epsilon, canaries, repeats = 1.0, 300, 2000
    right = rng.binomial(canaries, math.exp(epsilon) / (1.0 + math.exp(epsilon)), size=repeats)
    above = {int(v): Guesses(canaries, canaries, int(v)).epsilon(0.0) > epsilon for v in np.unique(right)}
    share = np.mean([above[int(v)] for v in right])
    assert 0.02 < share < 0.05 + 4.0 * math.sqrt(0.05 * 0.95 / repeats)  # at most 5 %, and not far below


def test_a_gaussian_is_refuted_no_more_often_than_allowed():
    rng = np.random.default_rng(1)
    mu, canaries, guesses, repeats = 1.0, 400, 100, 400
    refuted = 0
    for _ in range(repeats):
        member = rng.random(canaries) < 0.5
        score = rng.normal(size=canaries) + mu * member
        # A unit of signal for members: those with the most extreme scores are guessed, by their side of the middle.
        chosen = np.argsort(-np.abs(score - mu / 2.0))[:guesses]
        right = int((member[chosen] == (score[chosen] > mu / 2.0)).sum())
        refuted += Guesses(canaries, guesses, right).refutes_gaussian(mu * 0.999)
    assert refuted / repeats < 0.05 + 4.0 * math.sqrt(0.05 * 0.95 / repeats)


def test_counts_that_cannot_be_are_refused():
    for counts in [(10, 11, 5), (10, 5, 6), (0, 0, 0)]:
        with pytest.raises(ConfigurationError):
            Guesses(*counts)
    with pytest.raises(ConfigurationError, match="at most trials"):
        upper_rate(5, 4, 0.1)
    with pytest.raises(ConfigurationError, match="confidence"):
        Errors(false_positives=0, absent=1, false_negatives=0, present=1, confidence=1.0)
    with pytest.raises(ConfigurationError, match="delta"):
        Guesses(10, 10, 10).gaussian_epsilon(0.0)
