"""The search behind calibration: how often it looks, and what it finds on curves easy, steep, rough and flat."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.accounting import (
    Accountant,
    Bound,
    ComposedEvent,
    GaussianEvent,
    NoEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    calibrate_noise_multiplier,
    calibrate_rate,
    calibrate_steps,
    get_accountant,
    get_epsilon,
    register_accountant,
)
from privet.accounting.accountant import _FACTORIES
from privet.accounting.decimals import nearest
from privet.errors import AccountingError, ConfigurationError


class Counted(Accountant):
    """An accountant that counts what it is asked, and passes it on to another."""

    name = "counted"
    asked = 0
    by = "pld"

    def __init__(self):
        self.other = get_accountant(self.by)

    def bound_epsilon(self, event, delta, **question):
        type(self).asked += 1
        return self.other.bound_epsilon(event, delta, **question)

    def bound_delta(self, event, epsilon, **question):
        type(self).asked += 1
        return self.other.bound_delta(event, epsilon, **question)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_accountant("counted", Counted)
    yield
    _FACTORIES.pop("counted")


def asked(calibrate, *arguments, by="pld", **options):
    """Returns the certificate, and how many questions it took."""
    Counted.asked, Counted.by = 0, by
    return calibrate(*arguments, accountant="counted", **options), Counted.asked


def steps_of(sigma, rate, steps):
    return SelfComposedEvent(PoissonEvent(rate, GaussianEvent(sigma)), steps) if steps else NoEvent()


POINTS = [
    # σ, rate, steps, δ
    (1.0, 0.01, 10_000, 1e-5),
    (0.6, 0.1, 50, 1e-9),
    (0.3, 1.0, 1, 1e-12),
    (50.0, 1.0, 100_000, 1e-6),
    (5.0, 1e-3, 3_000_000, 1e-8),
    (2.0, 0.3, 7, 0.1),
    (1.0, 1e-4, 10_000, 1e-10),
]


def test_a_delta_of_1_is_no_target():
    for calibrate in (calibrate_noise_multiplier, calibrate_rate):
        with pytest.raises(ConfigurationError, match="any mechanism meets"):
            calibrate(1.0, 1.0, GaussianEvent)


@pytest.mark.parametrize("by", ["pld", "rdp"])
@pytest.mark.parametrize("point", POINTS)
def test_each_number_takes_few_questions(point, by):
    sigma, rate, steps, delta = point
    target = get_accountant(by).epsilon(steps_of(sigma, rate, steps), delta) * 1.00001
    noise, count = asked(calibrate_noise_multiplier, target, delta, lambda x: steps_of(x, rate, steps), by=by)
    assert noise.value == pytest.approx(sigma, rel=1e-3)
    assert noise.value - 1e-5 * noise.value <= noise.outside < noise.value == nearest(noise.value, 6)
    assert count <= 15
    most, count = asked(calibrate_steps, target, delta, lambda x: steps_of(sigma, rate, x), by=by)
    assert most.value == pytest.approx(steps, rel=5e-3)
    assert most.outside == most.value + 1
    assert count <= 15
    if rate < 1.0:
        found, count = asked(calibrate_rate, target, delta, lambda x: steps_of(sigma, x, steps), by=by)
        assert found.value == pytest.approx(rate, rel=1e-3)
        assert nearest(found.value, 6) == found.value < found.outside <= found.value + 1.1e-5 * found.value
        assert count <= 15


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 50.0), st.floats(-7, 0), st.floats(0, 7), st.floats(-12, -1))
def test_few_questions_anywhere(sigma, log_rate, log_steps, log_delta):
    rate, steps, delta = 10.0**log_rate, round(10.0**log_steps), 10.0**log_delta
    target = get_epsilon(steps_of(sigma, rate, steps), delta, accountant="rdp")
    if target < 1e-9:
        return  # nothing is asked for: see the flat curves below
    found, count = asked(calibrate_noise_multiplier, target, delta, lambda x: steps_of(x, rate, steps), by="rdp")
    assert found.epsilon <= target
    assert found.outside is None or found.epsilon_outside > target
    assert count <= 20


class Curve(Accountant):
    """An accountant of any function of the noise."""

    name = "curve"

    def __init__(self, epsilon):
        self.of, self.looks = epsilon, 0

    def bound_epsilon(self, event, delta, *, relation, group_size, lower):
        self.looks += 1
        return Bound(upper=self.of(event.noise_multiplier), lower=0.0, method=self.name)

    def bound_delta(self, event, epsilon, *, relation, group_size, lower):
        return Bound(upper=1.0 if self.of(event.noise_multiplier) > epsilon else 1e-9, lower=0.0, method=self.name)


def rough(sigma):
    """Returns a curve with noise in its fourth digit, as of grids that are made anew for each value."""
    return 4.0 / sigma * (1.0 + 1e-4 * math.sin(1e7 * sigma))


CURVES = {
    "power": (lambda sigma: 4.0 / sigma, 8),
    "rough": (rough, 14),
    "steep": (lambda sigma: math.exp(60.0 * (2.0 - sigma)), 14),
    "falls to 0": (lambda sigma: max(0.0, 4.0 / sigma - 2.0) * 50.0, 20),
    "jumps": (lambda sigma: 5e3 / sigma if sigma < 0.0123456 else 0.0, 18),
    "is infinite": (lambda sigma: math.inf if sigma < 2.2 else 1.0 / sigma, 18),
    "sags": (lambda sigma: 1 + math.expm1(40 * (3.3 - sigma)) if sigma < 3.3 else 1 - 1e-3 * (sigma - 3.3), 22),
    "hardly moves": (lambda sigma: 1.001 * sigma**-0.01, 8),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_of_every_shape_are_enclosed(name):
    curve, most = CURVES[name]
    accountant = Curve(curve)
    found = calibrate_noise_multiplier(1.0, 1e-5, GaussianEvent, accountant=accountant)
    assert found.epsilon == curve(found.value) <= 1.0 < curve(found.outside) == found.epsilon_outside
    within = 0.01 if name in {"jumps", "is infinite"} else 1e-5
    assert found.outside < found.value <= found.outside * (1.0 + 1.01 * within)
    assert accountant.looks <= most


class Steps(Curve):
    """An accountant of any function of the number of steps."""

    def bound_epsilon(self, event, delta, *, relation, group_size, lower):
        self.looks += 1
        return Bound(upper=self.of(event.count), lower=0.0, method=self.name)


@pytest.mark.parametrize("last", [1, 2, 7_654_321, 10**9 - 1])
def test_a_cliff_is_found_to_the_step_in_two_looks_more_than_bisection(last):
    # Interpolation alone would creep along the flat part. At most 7 looks enclose the cliff by a factor of 1000; then
    # bisection to a billionth of its logarithm takes 33, and the search two more.
    accountant = Steps(lambda steps: 0.999999 if steps <= last else 1e6)
    found = calibrate_steps(
        1.0, 1e-5, lambda n: SelfComposedEvent(GaussianEvent(1.0), n), accountant=accountant, most=10**9
    )
    assert (found.value, found.outside) == (last, last + 1)
    assert accountant.looks <= 7 + 33 + 2


class Forgetful(Curve):
    """An accountant whose answers change with what it was asked before, as where grids are kept."""

    def __init__(self):
        super().__init__(lambda sigma: 4.0 / sigma * (1.0 + 1e-3 * self.looks))


def test_the_certificate_is_what_a_new_accountant_says():
    register_accountant("forgetful", Forgetful)
    found = calibrate_noise_multiplier(1.0, 1e-5, GaussianEvent, accountant="forgetful")
    _FACTORIES.pop("forgetful")
    assert Forgetful().epsilon(GaussianEvent(found.value), 1e-5) == found.epsilon <= 1.0
    assert Forgetful().epsilon(GaussianEvent(found.outside), 1e-5) == found.epsilon_outside > 1.0
    found = calibrate_noise_multiplier(2.0, 1e-6, lambda x: steps_of(x, 0.02, 2000))
    assert get_epsilon(steps_of(found.value, 0.02, 2000), 1e-6) == found.epsilon
    assert get_epsilon(steps_of(found.outside, 0.02, 2000), 1e-6) == found.epsilon_outside


@pytest.mark.parametrize("relation", [Relation.ADD_OR_REMOVE_ONE, Relation.ZERO_OUT])
def test_groups_need_more_noise(relation):
    def event_of(sigma):
        return steps_of(sigma, 0.01, 500)

    one = calibrate_noise_multiplier(1.0, 1e-5, event_of, relation=relation)
    found = calibrate_noise_multiplier(1.0, 1e-5, event_of, relation=relation, group_size=3)
    assert (one.group_size, found.group_size) == (1, 3)
    assert found.value > 1.5 * one.value
    epsilon = get_epsilon(event_of(found.value), 1e-5, relation=relation, group_size=3)
    assert epsilon == found.epsilon <= 1.0
    with pytest.raises(ConfigurationError, match="group_size must be a whole number of at least 1"):
        calibrate_noise_multiplier(1.0, 1e-5, event_of, group_size=0)


def test_an_epsilon_of_0_is_a_target_like_any_other():
    # δ(0) of a Gaussian is 2 Φ(1 / 2σ) - 1.
    found, count = asked(calibrate_noise_multiplier, 0.0, 1e-3, GaussianEvent)
    assert found.value == pytest.approx(398.9423, rel=2e-5)
    assert found.epsilon == 0.0 < found.epsilon_outside
    assert count <= 16
    most = calibrate_steps(0.0, 1e-3, lambda n: SelfComposedEvent(GaussianEvent(4000.0), n))
    assert (most.value, most.outside) == (100, 101)


def test_where_everything_fits_the_answer_is_the_limit():
    needy = Curve(lambda sigma: 0.0)
    found = calibrate_noise_multiplier(1.0, 1e-5, GaussianEvent, accountant=needy)
    assert (found.value, found.epsilon, found.outside, found.epsilon_outside) == (0.0, 0.0, None, None)
    rate = calibrate_rate(0.0, 1e-5, lambda q: GaussianEvent(2.0 - q), accountant=needy)
    assert (rate.value, rate.outside) == (1.0, None)

    def positive(sigma):
        if sigma <= 0.0:
            raise ConfigurationError("No noise.")
        return GaussianEvent(sigma)

    found = calibrate_noise_multiplier(1.0, 1e-5, positive, accountant=needy)
    assert (found.value, found.outside) == (1e-6, None)


@pytest.mark.parametrize(
    ("target", "delta", "event_of"),
    [
        (1.0, 0.0, GaussianEvent),
        (0.0, 0.0, GaussianEvent),
        (1.0, 1e-5, lambda sigma: ComposedEvent((GaussianEvent(sigma), GaussianEvent(0.5)))),
    ],
)
def test_a_target_that_nothing_reaches_is_refused_in_few_questions(target, delta, event_of):
    with pytest.raises(AccountingError, match=r"No noise reaches .* allow more"):
        asked(calibrate_noise_multiplier, target, delta, event_of)
    assert Counted.asked <= 24
