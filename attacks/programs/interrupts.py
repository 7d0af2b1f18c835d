"""Runs that are interrupted, or fail, and go on: the next sum must be right, and nothing lost from the bill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attacks.doors import Paper, far, rows
from attacks.table import Billed, Outcome, attack
from privet import Budget, PrivacyEngine

KIND = "interrupts"


class Stop:
    """A hook that raises once, when it is told to."""

    def __init__(self, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.armed, self.error = False, error

    def __call__(self, *rest: Any) -> None:
        if self.armed:
            self.armed = False
            raise self.error


def after(where: Callable[[nn.Module, Stop], Any], examples: int = 8) -> float:
    """Returns how far the sum of the step after an interrupted one is off, in units of C."""

    def summed(interrupted: bool) -> Any:
        torch.manual_seed(0)
        net, stop = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), Stop()
        run = Paper(net)
        where(net, stop)
        run.step(50.0 * net(rows(8, 3)).square().mean())
        if interrupted:
            stop.armed = True
            with contextlib.suppress(KeyboardInterrupt):
                run.step(50.0 * net(rows(examples, 3, seed=1)).square().mean())
            assert not stop.armed, "it was not interrupted"
        run.optimizer.zero_grad()
        run.step(50.0 * net(rows(8, 3, seed=2)).square().mean())
        return run.seen[-1]

    return far(summed(True), summed(False)) * 1e3  # more than rounding is too much


@attack(KIND, "a forward interrupted, the next of the same size (error in units of C/1000)")
def _() -> Outcome:
    return after(lambda net, stop: net[1].register_forward_hook(stop))


@attack(KIND, "a forward interrupted, the next of another size (error in units of C/1000)")
def _() -> Outcome:
    return after(lambda net, stop: net[1].register_forward_hook(stop), examples=3)


@attack(KIND, "a forward without examples interrupted (error in units of C/1000)")
def _() -> Outcome:
    return after(lambda net, stop: net[1].register_forward_hook(stop), examples=0)


@attack(KIND, "a backward interrupted (error in units of C/1000)")
def _() -> Outcome:
    return after(lambda net, stop: net[1].register_full_backward_hook(stop), examples=3)


@attack(KIND, "an optimizer that fails in mid-step: the step stays billed")
def _() -> Outcome:
    run = Paper(nn.Linear(3, 2), noise=1.0)
    stop = Stop(RuntimeError)
    run.optimizer.register_step_pre_hook(stop)
    stop.armed = True
    with contextlib.suppress(RuntimeError):
        run.step(run.net(rows(8, 3)).square().mean())
    spent = run.engine.ledger.steps
    return Billed(float(spent), 1.0)


@attack(KIND, "a budget that is met, and the loop goes on")
def _() -> Outcome:
    engine = PrivacyEngine(accountant="rdp", budget=Budget(0.01, 1e-5))
    run = Paper(nn.Linear(3, 2), noise=1.0, engine=engine)
    run.step(run.net(rows(8, 3)).square().mean())
    return "nothing stopped it"
