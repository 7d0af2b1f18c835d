"""Every combination of a sampler's options: those of the table give its event, all others are refused by name."""

from __future__ import annotations

import itertools

import pytest
from click import UsageError

from privet.accounting import (
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    RandomAllocationEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
)
from privet.cli import main
from privet.cli.sampler import FORMS, sampler_of

VALUES = {"rate": 0.02, "batch_size": 10, "dataset_size": 1000, "cap": 30}
GAUSSIAN = GaussianEvent(1.0)
# Written out once more, so that the table in the code is not its own judge. By the options given, in the order above.
RIGHT = {
    ("poisson", "rate"): PoissonEvent(0.02, GAUSSIAN),
    ("poisson", "batch_size", "dataset_size"): PoissonEvent(0.01, GAUSSIAN),
    ("truncated-poisson", "rate", "dataset_size", "cap"): TruncatedPoissonEvent(0.02, 30, 1000, GAUSSIAN),
    ("truncated-poisson", "batch_size", "dataset_size", "cap"): TruncatedPoissonEvent(0.01, 30, 1000, GAUSSIAN),
    ("fixed-size", "batch_size", "dataset_size"): FixedSizeEvent(10, 1000, GAUSSIAN),
    ("random-allocation", "batch_size", "dataset_size"): RandomAllocationEvent(100, GAUSSIAN),
    ("partition",): PartitionEvent(1, GAUSSIAN),
    ("none",): GAUSSIAN,
}
COMBINATIONS = [
    (sampler, *options)
    for sampler in FORMS
    for size in range(len(VALUES) + 1)
    for options in itertools.combinations(VALUES, size)
]


RUN = ["--noise-multiplier", "1", "--steps", "1", "--delta", "1e-5"]


def option(name):
    return f"--{name.replace('_', '-')}"


def described(sampler, names, *, seeks_rate=False):
    options = {name: VALUES[name] if name in names else None for name in VALUES}
    return sampler_of(sampler, None, options, seeks_rate=seeks_rate)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_what_the_table_holds_is_the_event_and_all_else_is_refused(combination):
    sampler, *given = combination
    if combination in RIGHT:
        assert described(sampler, given).event(1.0, 1) == RIGHT[combination]
        return
    with pytest.raises(UsageError) as refused:
        described(sampler, given)
    message = refused.value.message
    assert f"'{sampler}'" in message
    # Following the advice leads to a combination that is right.
    advice = message[message.index(". ") :]
    adding, _, leaving = advice.partition("Leave out")
    for choice in leaving.split(", or "):
        kept = {name for name in given if option(name) not in choice}
        added = {name for name in VALUES if option(name) in adding}
        assert (sampler, *(name for name in VALUES if name in kept | added)) in RIGHT


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_command_that_seeks_the_rate_takes_what_is_left(combination):
    sampler, *given = combination
    right = {("poisson",): PoissonEvent, ("truncated-poisson", "dataset_size", "cap"): TruncatedPoissonEvent}
    if combination in right:
        event = described(sampler, given, seeks_rate=True).at_rate(0.5).event(1.0, 3)
        assert isinstance(event, SelfComposedEvent)
        assert isinstance(event.event, right[combination])
        assert event.event.rate == 0.5
        return
    with pytest.raises(UsageError, match=r"takes none of|takes --cap and --dataset-size|has no rate to find"):
        described(sampler, given, seeks_rate=True)


def test_the_relation_is_the_one_asked_for_or_the_samplers_own():
    options = dict.fromkeys(VALUES)
    assert sampler_of("partition", None, options, seeks_rate=False).relation is Relation.ZERO_OUT
    assert sampler_of("partition", "replace-one", options, seeks_rate=False).relation is Relation.REPLACE_ONE


def test_the_command_line_refuses_with_status_2_and_prints_no_number(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["epsilon", "--rate", ".5", "--batch-size", "10", "--dataset-size", "1000", *RUN])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Leave out --batch-size and --dataset-size, or --rate." in " ".join(printed.err.replace("│", " ").split())
