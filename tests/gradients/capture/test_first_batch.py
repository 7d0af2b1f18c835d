"""When the check of the first batch is due, and that it can be asked again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.first_batch import FirstBatch
from privet.gradients.capture.tripwire import Tripwires
from tests.contracts.doors import door_sum

ALL = frozenset({"weight", "bias"})


class Checked:
    """A linear layer with its check, and the numbers of examples that the second check saw."""

    def __init__(self) -> None:
        self.net = nn.Linear(3, 2)
        parameters = dict(self.net.named_parameters())
        self.capture = Capture(parameters)
        self.seen: list[int] = []
        self.mix = False
        self.first = FirstBatch(
            self.net,
            self.capture,
            Tripwires(parameters, self.capture.release),
            self.outputs,
            also=lambda inputs: self.seen.append(len(inputs)),
        )

    def outputs(self, x: Tensor) -> list[Tensor]:
        return [self.net(x) - self.net(x).mean(0)] if self.mix else [self.net(x)]

    def run(self, examples: int, value: float | None = None) -> None:
        x = torch.randn(examples, 3)
        if value is not None:
            x[0] = value
        self.first.run(x, examples)
        assert self.capture.cycle is None
        assert all(type(p) is nn.Parameter and p.grad is None for p in self.net.parameters())


def due(first: FirstBatch) -> list[int]:
    return [examples for examples in (0, 1, 2, 3, 64) if first.due(examples)]


def test_it_is_due_until_a_batch_of_two_was_seen() -> None:
    checked = Checked()
    assert due(checked.first) == [1, 2, 3, 64]
    checked.run(1)
    assert due(checked.first) == [2, 3, 64]
    checked.run(2)
    assert due(checked.first) == []
    assert checked.seen == [2], "one example cannot show whether examples are mixed"


def test_other_parameters_that_train_make_it_due_again() -> None:
    checked = Checked()
    checked.first.trains(ALL)
    checked.run(4)
    checked.first.trains(ALL)
    assert due(checked.first) == []
    checked.first.trains(frozenset({"bias"}))
    assert due(checked.first) == [1, 2, 3, 64]
    checked.run(4)
    assert due(checked.first) == []
    checked.first.trains(ALL)
    assert due(checked.first) == [1, 2, 3, 64], "what was checked before is checked again"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_check_that_could_not_compare_everything_does_not_count(value: float) -> None:
    checked = Checked()
    checked.run(4, value)
    assert due(checked.first) == [1, 2, 3, 64]
    checked.run(4)
    assert due(checked.first) == []


def test_it_can_be_asked_again_and_then_finds_what_is_new() -> None:
    checked = Checked()
    checked.run(4)
    checked.run(4)
    checked.mix = True
    with pytest.raises(CoverageError):
        checked.run(4)
    assert due(checked.first) == [1, 2, 3, 64], "a failed check does not leave the one before in force"
    checked.mix = False
    checked.run(4)
    assert due(checked.first) == []


def test_a_second_check_that_raises_leaves_it_due() -> None:
    checked = Checked()

    def refuse(inputs: Any) -> None:
        raise CoverageError("mixed")

    checked.first._also = refuse
    with pytest.raises(CoverageError, match="mixed"):
        checked.run(4)
    assert due(checked.first) == [1, 2, 3, 64]


def test_it_is_due_again_on_a_public_schedule() -> None:
    checked, at = Checked(), []
    for forward in range(1, 3000):
        checked.first.trains(ALL)
        if checked.first.due(4):
            at.append(forward)
            checked.first._seen = 2  # as after a check that was conclusive
    assert at == [1, 8, 64, 512, 1536, 2560]


def test_a_repeated_check_waits_for_a_backward_that_is_still_to_come() -> None:
    checked = Checked()
    checked.first.trains(ALL)
    assert checked.first.due(4, pending=True), "nothing was checked yet"
    checked.run(4)
    for _ in range(7):
        checked.first.trains(ALL)
    assert not checked.first.due(4, pending=True)
    assert checked.first.due(4)
    checked.first.trains(frozenset({"bias"}))
    assert checked.first.due(4, pending=True), "other parameters train"


@pytest.mark.parametrize("forwards", [2, 3])
def test_forwards_that_share_a_backward_pass_the_schedule(forwards: int) -> None:
    def loss(m: nn.Module, batch: Any) -> Tensor:
        return torch.stack([m(batch[0]) for _ in range(forwards)]).sum((0, 2))

    door_sum("paper", nn.Linear(3, 2), *[(torch.randn(4, 3),)] * 6, loss=loss)
