"""What a budget counts in the place of what ran is never more private, and what it does not know it leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.accounting import (
    ClipCountEvent,
    ComposedEvent,
    Event,
    FixedSizeEvent,
    GaussianEvent,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
    get_delta,
)
from privet.accounting.dominance import coarser, dominates, drift, rounded, worst

NOISE = st.one_of(st.floats(0.3, 30.0), st.sampled_from([0.0, 5e-324, 1e-200, 1.0, 1e200, 1.7e308]))
RATE = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 5e-324, 1e-12, 0.01, 1.0 - 1e-16, 1.0]))
TOUCHED = st.one_of(
    st.builds(GaussianEvent, NOISE),
    st.builds(lambda rate, noise: PoissonEvent(rate, GaussianEvent(noise)), RATE, NOISE),
    st.builds(lambda passes, noise: PartitionEvent(passes, GaussianEvent(noise)), st.integers(0, 5), NOISE),
)
WIDTH = st.sampled_from([1e-4, 0.001, 0.01, 0.1])


def numbers(event):
    noise = event.noise_multiplier if isinstance(event, GaussianEvent) else event.event.noise_multiplier
    return noise, event.rate if isinstance(event, PoissonEvent) else 1.0


@settings(deadline=None, max_examples=400)
@given(TOUCHED, WIDTH)
def test_a_rounded_event_has_at_most_the_noise_and_at_least_the_rate_and_is_near(event, width):
    found = rounded(event, width)
    (noise, rate), (new_noise, new_rate) = numbers(event), numbers(found)
    assert type(found) is type(event)
    assert noise / (1.0 + width) ** 2.01 <= new_noise <= noise
    assert rate <= new_rate <= min(1.0, rate * (1.0 + width) ** 2.01)
    assert dominates(found, event)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.6, 4.0), st.floats(1e-3, 1.0), st.floats(0.0, 3.0), st.sampled_from(list(Relation)), st.floats(0.0, 1.0)
)
def test_what_dominates_is_never_more_private(noise, rate, epsilon, relation, part):
    width = 0.05 * part + 1e-3
    for event in (
        PoissonEvent(rate, GaussianEvent(noise)),
        GaussianEvent(noise),
        PartitionEvent(2, GaussianEvent(noise)),
    ):
        before = get_delta(event, epsilon, relation=relation)
        after = get_delta(rounded(event, width), epsilon, relation=relation)
        assert after >= before * (1.0 - 1e-3) - 1e-12


@dataclass(frozen=True)
class Louder(GaussianEvent, kind="test_louder"):
    """A subclass may mean something else."""


UNTOUCHED = [
    NoEvent(),
    NonPrivateEvent(),
    Louder(1.2345),
    ClipCountEvent(1.2345, 7.8),
    PoissonEvent(0.1234, Louder(1.2345)),
    PoissonEvent(0.1234, PoissonEvent(0.1234, GaussianEvent(1.2345))),
    PoissonEvent(0.1234, ClipCountEvent(1.2345, 7.8)),
    PartitionEvent(2, PoissonEvent(0.1234, GaussianEvent(1.2345))),
    FixedSizeEvent(3, 100, GaussianEvent(1.2345)),
    TruncatedPoissonEvent(0.1234, 50, 100, GaussianEvent(1.2345)),
    ComposedEvent((GaussianEvent(1.2345),)),
    SelfComposedEvent(GaussianEvent(1.2345), 3),
]


@pytest.mark.parametrize("event", UNTOUCHED, ids=lambda event: f"{event.kind}-{hash(event) % 997}")
def test_other_events_stand_for_themselves_only(event):
    assert rounded(event, 0.1) == event
    assert worst([event], margin=(0.5, 0.5)) == event
    assert dominates(event, event)
    assert drift(event, event) == (0.0, 0.0)
    for other in (*UNTOUCHED, GaussianEvent(0.1), PoissonEvent(1.0, GaussianEvent(0.1))):
        assert other == event or not dominates(other, event)
        assert other == event or not dominates(event, other)


def test_shapes_do_not_mix():
    poisson, gaussian = PoissonEvent(0.5, GaussianEvent(2.0)), GaussianEvent(1.0)
    one, two = (PartitionEvent(passes, GaussianEvent(1.0)) for passes in (1, 2))
    for first, second in ((gaussian, poisson), (poisson, gaussian), (one, gaussian), (gaussian, one), (two, one)):
        assert not dominates(first, second)
    assert dominates(PoissonEvent(0.6, GaussianEvent(1.9)), poisson)
    assert not dominates(PoissonEvent(0.4, GaussianEvent(1.9)), poisson)
    assert not dominates(PoissonEvent(0.6, GaussianEvent(2.1)), poisson)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.builds(lambda r, s: PoissonEvent(r, GaussianEvent(s)), RATE, NOISE), min_size=1, max_size=9))
def test_the_worst_of_several_dominates_each(events):
    for margin in ((0.0, 0.0), (0.1, 0.2)):
        found = worst(events, margin=margin)
        assert all(dominates(found, event) for event in events)
    fall, rise = drift(events[0], events[-1])
    assert fall >= 0.0
    assert rise >= 0.0
    assert math.isfinite(fall)


def test_counts_of_what_rounds_to_one_event_add_up():
    events: dict[Event, int] = {PoissonEvent(0.01, GaussianEvent(1.0 + 1e-5 * i)): i for i in range(1, 400)}
    found = coarser(events, 0.01)
    assert len(found) <= 2
    assert sum(found.values()) == sum(events.values())
