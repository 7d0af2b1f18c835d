"""The best coefficients: known losses are met, derivatives are right, and the certificate can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from privet import AccountingError, ConfigurationError
from privet.accounting import GaussianEvent, PoissonEvent, Relation, SelfComposedEvent, Toeplitz, get_epsilon
from privet.noise import (
    BandMF,
    Participation,
    Workload,
    best_bands,
    expected_loss,
    optimized,
    optimized_bands,
    optimized_decay,
    optimized_decays,
)
from privet.noise.workload import loss_and_slope

# Of the mean error of prefix sums over 1024 steps, one participation: known from an independent computation.
BANDED = {2: 16.108, 4: 11.563, 8: 8.444, 16: 6.343, 32: 4.956}
OF_FOUR = (0.58631957, 0.50358596, 0.46851873, 0.42792609)
# Optimized for the largest error rather than the mean, so that the mean can still be a little less. Its six digits
# leave the fifth of the loss open.
DECAYS = Toeplitz((1.0,), (0.044441, 0.120545, 0.311390), (0.998973, 0.978560, 0.743283))
RAMP = tuple(1.0 - t / 48 for t in range(48))
RUNS = [
    (Participation(48), Workload()),
    (Participation(48, 4, 12), Workload(momentum=0.9)),
    (Participation(48, 3, 5), Workload(momentum=0.5, learning_rates=RAMP)),
    (Participation(1), Workload()),
]


@pytest.mark.parametrize("bands", BANDED)
def test_bands_meet_the_known_loss(bands):
    found = optimized_bands(bands, steps=1024)
    assert found.loss == pytest.approx(BANDED[bands], abs=6e-4)
    assert found.certified
    assert found.identity_loss == pytest.approx(22.6385, abs=1e-4)
    if bands == 4:
        column = np.array(found.noise.coefficients)
        assert column / np.linalg.norm(column) == pytest.approx(OF_FOUR, abs=1e-5)


def test_the_loss_of_known_matrices():
    assert expected_loss(DECAYS, Participation(1024)) == pytest.approx(3.11321, abs=1e-4)
    column = np.concatenate([[1.0], np.cumprod((2.0 * np.arange(1, 128) - 1.0) / (2.0 * np.arange(1, 128)))])
    for bands, loss in ((8, 26.973), (32, 15.666), (128, 10.294)):
        matrix = Toeplitz(tuple(column[:bands]))
        assert expected_loss(matrix, Participation(1024, 8, 128)) == pytest.approx(loss, abs=1e-3)
    for participation, decay, loss in (
        (Participation(1000), 0.956, 4.781),
        (Participation(1000, 10, 100), 0.953, 15.25),
    ):
        assert expected_loss(Toeplitz((1.0,), (decay,), (decay,)), participation) == pytest.approx(loss, abs=2e-3)


def test_decays_are_at_least_as_good_as_the_known_ones():
    found = optimized_decays(3, steps=1024)
    assert 3.05 < found.loss < 3.113
    assert found.certified
    single = optimized_decay(steps=1000)
    assert single.loss == pytest.approx(4.781, abs=1e-3)
    assert single.noise.decay == pytest.approx(0.956, abs=1e-3)
    many = optimized_decay(steps=1000, participations=10, separation=100)
    assert many.loss == pytest.approx(15.25, abs=5e-3)
    assert many.noise.decay == pytest.approx(0.953, abs=1e-3)


@pytest.mark.parametrize(("run", "work"), RUNS)
def test_the_loss_and_its_derivative_are_those_of_the_definition(run, work):
    steps = run.steps
    column = Toeplitz((1.0,), (0.3, 0.2), (0.9, 0.4)).column(steps)
    loss, slope = loss_and_slope(column, run, work)
    assert loss == pytest.approx(optimized.dense_loss(Toeplitz(tuple(column)), run, work), rel=1e-9)
    for place in {0, 1, steps // 2, steps - 1} & set(range(steps)):
        shift = np.zeros(steps)
        shift[place] = 1e-5
        around = [loss_and_slope(column + sign * shift, run, work)[0] for sign in (1.0, -1.0)]
        assert slope[place] == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("run", "work"), RUNS[:3])
def test_every_search_is_certified_and_better_than_independent_noise(run, work):
    options = {"participations": run.participations, "separation": run.separation, "workload": work}
    searches = (
        optimized_bands(8, steps=run.steps, **options),
        optimized_decays(2, steps=run.steps, **options),
        optimized_decay(steps=run.steps, **options),
    )
    for found in searches:
        assert found.certified
        assert found.loss == pytest.approx(optimized.dense_loss(found.noise.matrix, run, work), rel=1e-6)
        assert found.loss < found.identity_loss
    rng = np.random.default_rng(0)
    best = np.array(searches[0].noise.coefficients)
    for _ in range(20):  # no neighbor of the optimum is better
        near = np.sort(best * (1.0 + 0.02 * rng.standard_normal(len(best))))[::-1]
        assert expected_loss(Toeplitz(tuple(near)), run, work) >= searches[0].loss * (1 - 1e-6)


def test_a_wrong_loss_is_found_by_the_certificate(monkeypatch):
    def wrong(column, run, work):
        loss, slope = loss_and_slope(column, run, work)
        return 0.99 * loss, 0.99 * slope

    monkeypatch.setattr("privet.noise.workload.loss_and_slope", wrong)
    with pytest.raises(AccountingError, match="by its definition"):
        optimized_bands(3, steps=32)


def test_the_bands_of_a_target_are_calibrated_together():
    choices = best_bands(epsilon=8.0, delta=1e-5, rate=0.02, steps=100, bands=(1, 8, 64))
    assert [choice.error for choice in choices] == sorted(choice.error for choice in choices)
    assert {choice.bands for choice in choices} == {1, 8}  # 64 parts would need a rate above 1
    for choice in choices:
        rounds, sigma = -(-100 // choice.bands), choice.noise.multiplier
        event = SelfComposedEvent(PoissonEvent(0.02 * choice.bands, GaussianEvent(sigma)), rounds)
        epsilon = get_epsilon(event, 1e-5, relation=Relation.ZERO_OUT)
        assert epsilon == pytest.approx(choice.epsilon, rel=1e-9)
        assert 7.99 < epsilon <= 8.0
        loss = expected_loss(choice.noise.matrix, Participation(100))
        assert choice.error == pytest.approx(sigma * loss, rel=1e-9)
    alone = next(choice for choice in choices if choice.bands == 1)
    assert alone.error == pytest.approx(alone.noise.multiplier * math.sqrt(50.5), rel=1e-9)


def test_what_does_not_fit_together_is_refused():
    for make in (
        lambda: Participation(10, 3, 5),
        lambda: Participation(10, 2),
        lambda: Participation(0),
        lambda: Workload(momentum=1.0),
        lambda: Workload(learning_rates=(0.0, 0.0)),
        lambda: optimized_bands(2, steps=5, workload=Workload(learning_rates=(1.0,))),
        lambda: optimized_bands(2, steps=5000, workload=Workload(learning_rates=(1.0,) * 5000)),
        lambda: best_bands(epsilon=1.0, delta=1e-5, rate=0.6, steps=10, bands=(2,)),
        lambda: BandMF(1.0, 3),
    ):
        with pytest.raises(ConfigurationError):
            make()
