"""What uses keep between two calls of their rule, and what an operation keeps of its own call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import CoverageError, Flat
from privet.gradients.capture.handled import HandledCall
from privet.gradients.rules import normalization, registry
from privet.gradients.rules.free import Broadcast
from privet.gradients.use import Allowance, Operation, Use, Uses
from tests.contracts.doors import DOORS, assert_exact, door_sum, reference
from tests.gradients.harness import recorded_of
from tests.gradients.rule_cases import CASES, Case, loss

ROWS, WIDTH = 5, 7


def uses_of(*, left: int) -> Uses:
    """Returns uses whose rule has no other way than to form per-example gradients, ROWS x WIDTH x 4 bytes."""
    operation = Broadcast((ROWS, WIDTH), (WIDTH,))
    use = Use(operation, "value", (), torch.arange(1.0, 1 + ROWS * WIDTH).view(ROWS, WIDTH), (WIDTH,))
    return Uses((use,), allowance=Allowance(left))


@pytest.mark.parametrize(("left", "kept"), [(10**6, True), (ROWS * WIDTH * 4, True), (ROWS * WIDTH * 4 - 1, False)])
def test_rows_are_kept_for_the_sum_as_far_as_the_allowance_goes(
    left: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = uses_of(left=left)
    formed = []
    rule = type(uses.rule)
    real = rule.per_example
    monkeypatch.setattr(rule, "per_example", lambda self, u: (formed.append(1), real(self, u))[1])
    norms = uses.rule.squared_norms(uses)
    assert (uses.rows_memo is not None) is kept
    assert uses.allowance.left == (left - ROWS * WIDTH * 4 if kept else left)
    weights = torch.rand(ROWS)
    found = uses.rule.weighted_sum(uses, weights)
    assert len(formed) == (1 if kept else 2)
    torch.testing.assert_close(norms, uses[0].gradient.square().sum(1))
    torch.testing.assert_close(found, weights @ uses[0].gradient)


def test_a_sum_alone_keeps_nothing() -> None:
    uses = uses_of(left=10**6)
    uses.rule.weighted_sum(uses, torch.ones(ROWS))
    assert uses.rows_memo is None
    assert uses.allowance.left == 10**6


def test_some_of_the_rows_share_no_memory_and_keep_none() -> None:
    uses = uses_of(left=10**6)
    uses.rule.squared_norms(uses)
    left = uses.allowance.left
    part = uses.narrowed(1, 4)
    assert part.rows_memo is None, "the memo holds rows that were left out"
    part.rule.squared_norms(part)
    assert part.rows_memo is None
    assert uses.allowance.left == left


def test_without_dropped_rows_the_kept_ones_are_those_whose_norms_were_taken() -> None:
    uses = uses_of(left=10**6)
    uses.rule.squared_norms(uses)
    kept, dropped = uses.rows_memo, torch.arange(ROWS) == 2
    assert kept is not None
    masked = uses.masked(dropped).rows_memo
    assert masked is not None
    assert torch.equal(masked[~dropped], kept[~dropped])
    assert not bool(masked[dropped].any())
    assert masked.data_ptr() != kept.data_ptr(), "the rows may be the user's own"


def test_a_dropped_row_that_was_kept_is_not_in_the_sum() -> None:
    uses = uses_of(left=10**6)
    uses[0].gradient[2, 3] = float("nan")
    uses.rule.squared_norms(uses)
    assert uses.rows_memo is not None
    dropped = torch.arange(ROWS) == 2
    masked = uses.masked(dropped)
    weights = torch.ones(ROWS).masked_fill(dropped, 0.0)
    assert bool(masked.rule.weighted_sum(masked, weights).isfinite().all())
    assert not bool(uses.rule.weighted_sum(uses, weights).isfinite().all()), "a weight of zero is enough: why mask?"


# -- an operation is made for one call -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_handler_shares_an_operation_between_two_calls(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Operation] = []
    apply = HandledCall.apply

    def spied(self: Any, operation: Operation, *rest: Any, **options: Any) -> Any:
        seen.append(operation)
        return apply(self, operation, *rest, **options)

    monkeypatch.setattr(HandledCall, "apply", spied)
    module, batch = case.module().double(), case.inputs(3, torch.float64)
    recorded_of(module, batch, loss)
    recorded_of(module, batch, loss)
    assert seen
    assert len({id(operation) for operation in seen}) == len(seen)


class TwoCalls(nn.Module):
    """One layer norm, called on data of two different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.norm(torch.tanh(self.norm(h) * 3.0 + 1.0)) * self.norm(h.exp())


def cubes(module: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return module(batch[0]).pow(3).sum(1)


@pytest.mark.parametrize("door", DOORS)
def test_each_call_keeps_its_own_state(door: str) -> None:
    module, batch = TwoCalls().double(), (torch.randn(5, 4, dtype=torch.float64),)
    expected = reference(module, batch, cubes, Flat(0.5))
    assert_exact(door_sum(door, module, batch, loss=cubes, policy=Flat(0.5)), expected)


@pytest.mark.parametrize("door", DOORS)
def test_an_operation_that_two_calls_share_is_refused_on_the_first_batch(
    door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = normalization.LayerNorm((6,), 1e-5)

    def handler(call: registry.Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call.apply(shared, (args[0],), {"weight": kwargs["weight"], "bias": kwargs["bias"]})

    monkeypatch.setitem(registry._HANDLERS, F.layer_norm, handler)
    with pytest.raises(CoverageError):
        door_sum(door, TwoCalls().double(), (torch.randn(5, 4, dtype=torch.float64),), loss=cubes)
