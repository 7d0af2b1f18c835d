"""Descriptions: rates that are never floored, and the event that each sampling earns."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privet.accounting.event import GaussianEvent, NoEvent, PartitionEvent, PoissonEvent, SelfComposedEvent
from privet.errors import ConfigurationError
from privet.sampling import BatchTicket, Partition, Poisson

BASE = GaussianEvent(1.1)


@settings(max_examples=200, deadline=None)
@given(batch=st.integers(1, 2000), more=st.integers(0, 1_000_000))
@example(batch=1, more=48)
@example(batch=600, more=59_400)
def test_the_rate_is_exact_and_steps_round_up(batch, more):
    size = batch + more
    sampling = Poisson.of(batch, size)
    assert sampling.rate == batch / size
    assert sampling.steps_per_epoch == -(-size // batch)


def test_tiny_rates_have_epochs_and_none_has_none():
    assert Poisson(1e-12).steps_per_epoch in (10**12, 10**12 + 1)
    assert Poisson(1.0).steps_per_epoch == 1
    with pytest.raises(ConfigurationError, match="rate of 0"):
        _ = Poisson(0.0).steps_per_epoch


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "0.1", None, True])
def test_a_rate_is_a_probability(rate):
    with pytest.raises(ConfigurationError, match="rate"):
        Poisson(rate)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigurationError, match="at most 10"):
        Poisson.of(11, 10)


def test_poisson_is_billed_per_step_and_a_partition_per_pass():
    assert Poisson(0.25).event_for(BASE) == PoissonEvent(0.25, BASE)
    assert Poisson(0.25).event_for(BASE, 3) == SelfComposedEvent(PoissonEvent(0.25, BASE), 3)
    assert Partition().event_for(BASE, 3) == Partition(shuffled=True).event_for(BASE, 3) == PartitionEvent(3, BASE)
    assert Poisson(0.25).event_for(BASE, 0) == Partition().event_for(BASE, 0) == NoEvent()
    assert (Poisson(0.25).billed_per, Partition().billed_per) == ("step", "pass")
    with pytest.raises(ConfigurationError):
        Poisson(0.25).event_for(BASE, -1)


def test_a_ticket_can_say_that_more_of_its_logical_batch_follows():
    assert BatchTicket(step=0, index=0, passes=1, size=3).last
    assert not BatchTicket(step=0, index=0, passes=1, size=3, last=False).last
