"""KeyboardInterrupt at any line: what follows is right, or refused for its own reason, and the bill covers it."""

from __future__ import annotations

import pytest

from privet.errors import ProtocolError
from privet.training.materialised import Materialised
from privet.training.update import PrivateUpdate
from tests.contracts.interrupts import WAYS, Lines, Run, interrupted, lines_of

SAMPLES = 6


def sampled(way: str, *, first: bool, start: int) -> list[int]:
    """Returns lines spread over a step, others for every way: together they meet far more than one way does."""
    lines = lines_of(way, first=first)
    stride = lines // SAMPLES
    return list(range(1 + (start * 37) % stride, lines, stride))


@pytest.mark.parametrize("way", WAYS)
def test_after_an_interrupt_the_next_step_is_right(way: str) -> None:
    for k in sampled(way, first=False, start=WAYS.index(way)):
        interrupted(way, Lines(k), first=False)


@pytest.mark.parametrize("way", ["paper", "explicit"])
def test_after_an_interrupt_in_the_first_check_the_next_step_is_right(way: str) -> None:
    for k in sampled(way, first=True, start=7)[::2]:
        interrupted(way, Lines(k), first=True)


@pytest.mark.deep
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_after_an_interrupt_at_any_line_the_next_step_is_right(way: str, first: bool) -> None:
    for k in range(1, lines_of(way, first=first) + 1):
        lines = Lines(k)
        try:
            interrupted(way, lines, first=first)
        except Exception as error:
            error.add_note(f"after an interrupt at {lines.where}, line {k} of the step")
            raise


def test_the_interrupt_comes_at_the_line_that_is_asked_for() -> None:
    lines = Lines(200)
    interrupted("paper", lines, first=False)
    assert lines.seen >= 200
    assert "privet" in lines.where


def test_an_interrupt_between_bill_and_noise_leaves_the_step_billed() -> None:
    """The planted bug below, a bill after the noise, would be seen by the count of moves and steps."""
    run = Run("paper")
    x = next(run.batches())
    release = run.update.noise.release

    def broken(*args: object, **rest: object) -> object:
        raise KeyboardInterrupt

    run.update.noise.release = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        run.step(x)
    run.update.noise.release = release  # type: ignore[method-assign]
    assert run.door.ledger.steps == 1
    run.look()
    assert run.moved == 0
    run.next_step_is_right()


def test_a_bill_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("paper")
    monkeypatch.setattr(run.update.billing, "begin", lambda *args, **rest: None)
    run.step(next(run.batches()))
    with pytest.raises(AssertionError, match="more often than billed"):
        run.look()


def test_rows_that_an_interrupt_leaves_on_some_parameters_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows on one parameter alone, every step from now on is refused."""
    monkeypatch.setattr(Materialised, "_drop", lambda self: None)
    run = Run("paper, hooks")
    run.net[0].weight.grad_sample = run.net[0].weight.detach()[None].clone()
    with pytest.raises(AssertionError, match="four errors"):
        run.next_step_is_right()


def test_a_sum_that_an_interrupt_leaves_at_the_explicit_door_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("explicit")
    x = next(run.batches())
    monkeypatch.setattr(run.update.hooks, "renew", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.step(x)
    monkeypatch.undo()
    assert run.update.pending
    with monkeypatch.context() as patch:
        patch.setattr(PrivateUpdate, "discard", lambda self: None)
        with pytest.raises(ProtocolError, match="second backward"):
            run.step(x)
    run.step(x)
    run.next_step_is_right()


def _interrupt() -> None:
    raise KeyboardInterrupt
