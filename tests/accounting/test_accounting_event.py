"""Events: frozen, checked, and the same after JSON."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
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
    RandomAllocationEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
    Unit,
    repeated,
)
from privet.errors import ConfigurationError

LEAVES = st.one_of(
    st.just(NoEvent()),
    st.just(NonPrivateEvent()),
    st.builds(GaussianEvent, st.floats(0, 1e6)),
    st.builds(ClipCountEvent, st.floats(0, 1e6), st.floats(0, 1e6)),
)
EVENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(PoissonEvent, st.floats(0, 1), inner),
        st.builds(TruncatedPoissonEvent, st.floats(0, 1), st.integers(1, 99), st.integers(1, 999), inner),
        st.builds(FixedSizeEvent, st.integers(0, 9), st.integers(9, 99), inner),
        st.builds(PartitionEvent, st.integers(0, 9), inner),
        st.builds(RandomAllocationEvent, st.integers(1, 2**40), inner),
        st.builds(SelfComposedEvent, inner, st.integers(0, 10**9)),
        st.builds(ComposedEvent, st.lists(inner, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)


@given(EVENTS)
def test_events_survive_json_exactly(event):
    again = Event.from_dict(json.loads(json.dumps(event.to_dict(), allow_nan=False)))
    assert again == event
    assert hash(again) == hash(event)


def test_events_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GaussianEvent(1.0).noise_multiplier = 2.0


BAD = [
    (lambda: GaussianEvent(-1.0), r"noise_multiplier must be .* at least 0, got -1.0"),
    (lambda: GaussianEvent(math.nan), r"got nan"),
    (lambda: GaussianEvent(math.inf), r"got inf"),
    (lambda: GaussianEvent("1"), r"got '1'"),
    (lambda: PoissonEvent(1.0001, GaussianEvent(1.0)), r"rate must be a number in \[0, 1\], got 1.0001"),
    (lambda: PoissonEvent(-0.1, GaussianEvent(1.0)), r"rate must be a number in \[0, 1\], got -0.1"),
    (lambda: PoissonEvent(math.nan, GaussianEvent(1.0)), r"rate must be .*, got nan"),
    (lambda: PoissonEvent(0.1, 1.0), r"event must be an Event, got 1.0"),
    (lambda: SelfComposedEvent(GaussianEvent(1.0), 2.5), r"count must be a whole number of at least 0, got 2.5"),
    (lambda: SelfComposedEvent(GaussianEvent(1.0), -1), r"count must be a whole number of at least 0, got -1"),
    (lambda: SelfComposedEvent(GaussianEvent(1.0), True), r"count must be a whole number"),
    (lambda: PartitionEvent(1.5, GaussianEvent(1.0)), r"passes must be a whole number"),
    (lambda: FixedSizeEvent(11, 10, GaussianEvent(1.0)), r"batch_size must be at most dataset_size = 10, got 11"),
    (lambda: TruncatedPoissonEvent(0.1, 0, 10, GaussianEvent(1.0)), r"cap must be a whole number of at least 1"),
    (lambda: ComposedEvent(GaussianEvent(1.0)), r"events must be a sequence of events"),
    (lambda: ComposedEvent((1,)), r"must be an Event, got 1"),
    (
        lambda: Event.from_dict({"kind": "gausian", "noise_multiplier": 1.0}),
        r"a kind among .*'gaussian'.*got 'gausian'",
    ),
    (lambda: Event.from_dict({"kind": "gaussian"}), r"has the fields \['noise_multiplier'\], got \[\]"),
    (lambda: Event.from_dict([1]), r"a kind among"),
    (lambda: Event.from_dict({"kind": "gaussian", "noise_multiplier": -1.0}), r"at least 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=range(len(BAD)))
def test_bad_values_are_refused_with_value_and_range(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_kind_is_taken_once():
    with pytest.raises(ConfigurationError, match="taken by GaussianEvent"):
        type("Other", (Event,), {}, kind="gaussian")


def test_repeating():
    step = PoissonEvent(0.1, GaussianEvent(1.0))
    assert repeated(step, 1) == step
    assert repeated(step, 5) == SelfComposedEvent(step, 5)
    assert repeated(step, 0) == NoEvent()
    assert repeated(PartitionEvent(1, GaussianEvent(1.0)), 5) == PartitionEvent(5, GaussianEvent(1.0))


def test_relation_and_unit_are_typed():
    assert {relation.value for relation in Relation} == {"add_or_remove_one", "replace_one", "zero_out"}
    assert Unit("user") is Unit.USER
