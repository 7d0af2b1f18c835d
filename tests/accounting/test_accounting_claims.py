"""Random mechanisms and compositions: every claim is held to the oracle. `make explore` draws other examples.

An accountant's ε is at least what some data set reaches, its lower bound at most what is proven, and on Poisson
sampling it is within 1 % of the truth.
"""

from __future__ import annotations

import math
import os

import pytest
from hypothesis import HealthCheck, event, given, settings, target
from hypothesis import strategies as st
from oracle_checks import check_claim, check_delta
from oracle_contour import patience

from privet.accounting import (
    ClipCountEvent,
    ComposedEvent,
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PldAccountant,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
)

EXPLORING = os.environ.get("HYPOTHESIS_PROFILE") == "explore"


def examples(ordinary):
    """Returns settings: half as many examples in `make test`, three hundred times as many in `make explore`."""
    return settings(
        max_examples=ordinary * 300 if EXPLORING else max(2, ordinary // 2),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def powers(low, high):
    return st.floats(math.log10(low), math.log10(high)).map(lambda exponent: 10.0**exponent)


def counts(most):
    return powers(1.0, most).map(lambda count: max(1, round(count)))


SIGMAS, RATES, STEPS, DELTAS = powers(0.3, 50.0), powers(1e-7, 1.0), counts(1e7), powers(1e-12, 0.1)
RELATIONS = st.sampled_from(list(Relation))
GAUSSIANS = SIGMAS.map(GaussianEvent) | st.builds(ClipCountEvent, SIGMAS, powers(0.5, 50.0))
PLAIN = st.builds(PoissonEvent, RATES, GAUSSIANS)


@st.composite
def fixed_sizes(draw, inner=GAUSSIANS):
    total = draw(counts(100_000))
    return FixedSizeEvent(draw(st.integers(1, total)), total, draw(inner))


@st.composite
def truncated(draw, inner=GAUSSIANS):
    total, rate = draw(counts(2000)), draw(powers(1e-3, 1.0))
    spread = math.sqrt(total * rate * (1.0 - rate)) + 1.0
    cap = max(1, round(total * rate + draw(st.floats(-2.0, 6.0)) * spread))
    return TruncatedPoissonEvent(rate, cap, total, draw(inner))


def repeated(events, most):
    return st.builds(SelfComposedEvent, events, counts(most))


SAMPLED = PLAIN | fixed_sizes() | truncated() | GAUSSIANS | st.builds(PartitionEvent, st.integers(0, 3), GAUSSIANS)
INNER = PLAIN | st.builds(PartitionEvent, st.integers(0, 3), GAUSSIANS) | repeated(PLAIN, 5)
NESTED = st.builds(PoissonEvent, powers(1e-3, 1.0), INNER) | fixed_sizes(INNER) | truncated(INNER)


@pytest.fixture(autouse=True, scope="module")
def _work():
    """In `make test` an integral that is slow to settle counts as undecided."""
    with patience(2e9 if EXPLORING else 3e7):
        yield


def record(excess):
    """Leads the search to where claims are loosest, and keeps the figure in the statistics."""
    if math.isfinite(excess):
        target(max(excess, 0.0), label="ε over the truth, less 1")
        event(f"excess below 1e{math.ceil(math.log10(max(excess, 1e-7)))}")
    else:
        event("excess not decided")


@examples(25)
@given(SIGMAS, RATES, STEPS, DELTAS)
def test_poisson(sigma, rate, steps, delta):
    record(check_claim(SelfComposedEvent(PoissonEvent(rate, GaussianEvent(sigma)), steps), delta, within=0.01))


@pytest.mark.deep
@examples(4)
@given(powers(0.3, 0.8), powers(1e-7, 1e-4), STEPS, DELTAS)
def test_rare_heavy_losses(sigma, rate, steps, delta):
    record(check_claim(SelfComposedEvent(PoissonEvent(rate, GaussianEvent(sigma)), steps), delta, within=0.01))


@examples(12)
@given(repeated(SAMPLED, 3000), DELTAS, RELATIONS)
def test_every_sampler_and_relation(mechanism, delta, relation):
    record(check_claim(mechanism, delta, relation))


@examples(8)
@given(repeated(SAMPLED, 300), DELTAS, RELATIONS, st.integers(2, 8))
def test_groups(mechanism, delta, relation, size):
    record(check_claim(mechanism, delta, relation, size))


@pytest.mark.deep
@examples(4)
@given(st.lists(repeated(SAMPLED, 3000), min_size=2, max_size=4), DELTAS, RELATIONS)
def test_compositions_of_several_samplers(parts, delta, relation):
    record(check_claim(ComposedEvent(tuple(parts)), delta, relation))


@examples(8)
@given(repeated(NESTED, 30), DELTAS, RELATIONS)
def test_sampling_around_sampling(mechanism, delta, relation):
    record(check_claim(mechanism, delta, relation))


@examples(2)
@given(
    SIGMAS, st.floats(-1e-2, 1e-2), powers(1e-3, 0.5), st.integers(2, 100 if EXPLORING else 25), counts(1000), DELTAS
)
def test_schedules_of_many_distinct_terms(sigma, drift, rate, terms, steps, delta):  # noqa: PLR0917  drawn
    """Each phase has its own σ, as under a schedule of the noise."""
    phases = [
        SelfComposedEvent(PoissonEvent(rate, GaussianEvent(sigma * (1 + drift) ** i)), steps) for i in range(terms)
    ]
    record(check_claim(ComposedEvent(tuple(phases)), delta, within=0.01))


@examples(6)
@given(repeated(SAMPLED, 3000), powers(1e-3, 30.0), RELATIONS)
def test_delta_at_epsilon(mechanism, epsilon, relation):
    check_delta(mechanism, epsilon, relation)


@examples(10)
@given(repeated(SAMPLED, 3000), DELTAS, RELATIONS)
def test_delta_of_epsilon_of_delta(mechanism, delta, relation):
    """Both are upper bounds of one curve, so δ at the claimed ε is δ up to what the two may add."""
    asked = PldAccountant()
    epsilon = asked.epsilon(mechanism, delta, relation=relation)
    if 1e-9 < epsilon < math.inf:
        back = asked.epsilon(mechanism, asked.delta(mechanism, epsilon, relation=relation), relation=relation)
        assert back == pytest.approx(epsilon, rel=1e-2)


SLACK = 3e-4  # how far above the truth each of two claims may lie, relative


class TestMonotone:
    """The more is released, the less noise, the smaller δ: the larger ε. Asserted of the claims themselves."""

    @staticmethod
    def assert_no_less(more, less):
        assert more >= less * (1.0 - SLACK) - 1e-9, (more, less)

    @examples(8)
    @given(SIGMAS, RATES, STEPS, DELTAS, st.floats(1.001, 3.0))
    def test_in_steps_rate_noise_and_delta(self, sigma, rate, steps, delta, factor):
        def ask(sigma, rate, steps, delta):
            return PldAccountant().epsilon(SelfComposedEvent(PoissonEvent(rate, GaussianEvent(sigma)), steps), delta)

        found = ask(sigma, rate, steps, delta)
        self.assert_no_less(ask(sigma, rate, math.ceil(steps * factor), delta), found)
        self.assert_no_less(ask(sigma, min(1.0, rate * factor), steps, delta), found)
        self.assert_no_less(ask(sigma / factor, rate, steps, delta), found)
        self.assert_no_less(ask(sigma, rate, steps, delta / factor), found)

    @examples(8)
    @given(repeated(SAMPLED, 3000), repeated(SAMPLED, 30), DELTAS, RELATIONS)
    def test_in_any_further_release(self, mechanism, further, delta, relation):
        alone = PldAccountant().epsilon(mechanism, delta, relation=relation)
        self.assert_no_less(
            PldAccountant().epsilon(ComposedEvent((mechanism, further)), delta, relation=relation), alone
        )

    @examples(8)
    @given(repeated(SAMPLED, 300), DELTAS, RELATIONS, st.integers(1, 5))
    def test_in_the_size_of_a_group(self, mechanism, delta, relation, size):
        fewer, more = (
            PldAccountant().epsilon(mechanism, delta, relation=relation, group_size=k) for k in (size, size + 1)
        )
        self.assert_no_less(more, fewer)
