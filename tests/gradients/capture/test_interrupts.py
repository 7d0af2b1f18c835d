"""A KeyboardInterrupt anywhere in a forward or a backward: the step after is right."""

from __future__ import annotations

import collections
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import privet.gradients
from privet import Flat, PrivacyEngine, ProtocolError
from privet.gradients.capture import loss_watch
from tests.contracts.doors import assert_exact, door_sum, loader, reference, taken

WATCHED = str(Path(privet.gradients.__file__).parent)
N = 16
STRIDE = 5
"""Every fifth place is tried, which takes seconds. With 1, all are."""


class Interrupting:
    """Raises KeyboardInterrupt at the n-th place inside `privet.gradients` where Python may deliver a signal.

    That is where a function begins, and where a call of a function of C has returned.
    """

    def __init__(self, place: int) -> None:
        self.left = place

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # Python closes a generator where no exception can be raised
        if event in {"call", "c_return"} and frame.f_code.co_filename.startswith(WATCHED):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


@contextlib.contextmanager
def interrupted_at(place: int) -> Iterator[Interrupting]:
    interrupting = Interrupting(place)
    before = sys.getprofile()
    sys.setprofile(interrupting)
    try:
        yield interrupting
    finally:
        sys.setprofile(before)


class Net(nn.Module):
    """A use of each kind: a rule, an expansion, a derived tensor, and a part that is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(3, 4), nn.Linear(4, 4), nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.second, torch.tanh(self.first(x)), use_reentrant=False)
        return torch.tanh(h) @ self.second.weight[:2].t() * self.scale


def loss(module: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return module(batch[0]).square().sum(1)


def private() -> tuple[nn.Module, torch.optim.Optimizer, PrivacyEngine]:
    torch.manual_seed(0)
    net, engine = Net().double(), PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loader(),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        loss_reduction="sum",
    )
    return net, optimizer, engine


def batch_of(examples: int) -> tuple[Tensor]:
    return (torch.randn(examples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(examples)),)


def places_of(step: Any) -> int:
    """Returns how many places a step offers to an interrupt."""
    with interrupted_at(10**9) as counting:
        step()
    return 10**9 - counting.left


@pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
@pytest.mark.parametrize(("interrupted", "then"), [(N, N), pytest.param(N, 5, marks=pytest.mark.deep), (0, 1), (5, 0)])
def test_the_step_after_an_interrupt_anywhere_is_right(
    interrupted: int, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_watch, "_OFTEN", 10**9)  # the loss is looked at in every backward: as many places in each
    net, optimizer, _ = private()
    seen = taken(net, optimizer)

    def forward_and_backward(batch: tuple[Tensor]) -> None:
        loss(net, batch).sum().backward()

    def step(batch: tuple[Tensor]) -> None:
        forward_and_backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    def expected(batch: tuple[Tensor]) -> dict[str, Tensor]:
        plain = Net().double()
        plain.load_state_dict(net.state_dict())
        return (
            reference(plain, batch, loss, Flat(0.3))
            if len(batch[0])
            else {n: 0 * p for n, p in plain.named_parameters()}
        )

    for batch in (batch_of(N), batch_of(1), batch_of(0)):  # what is checked once is checked
        step(batch)
    first, second = batch_of(interrupted), batch_of(then)
    of_first, of_second = expected(first), expected(second)
    places = places_of(lambda: forward_and_backward(first))
    optimizer.step()
    assert places > 500, "next to nothing was traced"
    outcomes: collections.Counter[str] = collections.Counter()
    for place in range(1, places + 1, STRIDE):
        with interrupted_at(place), contextlib.suppress(KeyboardInterrupt):
            forward_and_backward(first)
        said = refusal(lambda: (optimizer.zero_grad(), step(second)))
        if "zero_grad() between backward and step" in said:  # the sum was handed over before the interrupt
            optimizer.step()
            assert_same(seen[-1], of_first, place)
        elif said:  # the forward was whole, and its output was lost
            assert f"follows one of {interrupted} that had no backward" in said, place
        if said:
            optimizer.zero_grad()
            step(second)
        outcomes[said] += 1
        assert_same(seen[-1], of_second, place)
        assert all(type(p) is nn.Parameter for p in net.parameters()), place
    assert outcomes[""] > 0.9 * outcomes.total(), outcomes


def refusal(do: Callable[[], Any]) -> str:
    """Returns what a ProtocolError said, and nothing if there was none."""
    try:
        do()
    except ProtocolError as error:
        return str(error)
    return ""


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], place: int) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=f"{name} is wrong, interrupted at place {place}")


@pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
def test_a_part_run_by_itself_after_an_interrupted_forward_is_refused_for_that_reason() -> None:
    net, optimizer, _ = private()
    loss(net, batch_of(N)).sum().backward()
    optimizer.step()
    assert isinstance(net, Net)
    handle = net.second.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        loss(net, batch_of(N))
    handle.remove()
    with pytest.raises(ProtocolError, match="a forward that was interrupted"):
        net.first(batch_of(N)[0]).sum().backward()
    assert not net.eval()(batch_of(3)[0]).grad_fn.name().startswith("Captured")
    net.train()
    loss(net, batch_of(N)).sum().backward()
    optimizer.step()


def interrupt(*rest: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
def test_a_module_that_calls_itself_is_one_forward() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, times: int = 2) -> Tensor:
            h = self.layer(x)
            with torch.no_grad():
                target = self(x, 0) if times else x
            h = self(h, times - 1) - target if times else h
            return self.last(h) @ self.last.weight

    def cubes(module: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return module(batch[0]).pow(3).sum(1)

    net, batch = Again().double(), batch_of(4)
    expected = reference(net, batch, cubes, Flat(0.3))
    assert_exact(door_sum("paper", net, batch, loss=cubes, policy=Flat(0.3)), expected)
