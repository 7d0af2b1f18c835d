"""KeyboardInterrupt at the k-th line of privet that a step runs, and what must hold after it."""

from __future__ import annotations

import dis
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import privet
from privet import (
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    PrivetError,
)
from privet.gradients.reference import example_gradients
from privet.training.virtual_steps import BatchMemoryManager
from tests.contracts.doors import assert_exact, expected_sum

SOURCE = str(Path(privet.__file__).parent)
DATA = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(1)))
PROBE = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))


@functools.cache
def ends_of_with(code: CodeType) -> frozenset[int]:
    """Returns where a `with` is left as planned. Python traces a line there, and delivers no interrupt before the exit.

    For it looks for interrupts after calls and jumps, and the three constants for `__exit__` are neither.
    """
    found = list(dis.get_instructions(code))
    ends = set()
    for before, *three in zip(found, found[1:], found[2:], found[3:], strict=False):
        if all(each.opname == "LOAD_CONST" and each.argval is None for each in three):
            ends |= {three[0].offset} | ({before.offset} if before.opname == "SWAP" else set())  # SWAP: a return inside
    return frozenset(ends)


class Lines:
    """Counts the lines of privet that run in this thread, and interrupts the k-th."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.seen = 0
        self.where = "nowhere"

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and frame.f_lasti not in ends_of_with(frame.f_code):
            self.seen += 1
            if self.seen == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line

    @contextmanager
    def running(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)


class Run:
    """A private run that knows which sums were released, and how often its parameters moved."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(0)
        self.way = way
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.sums: list[dict[str, Tensor]] = []
        self.door: Any
        if way.startswith("explicit"):
            performance = {
                "explicit": Performance(),
                "explicit, two passes": Performance(passes=2),
                "explicit, in parts": Performance(physical_batch_size=3),
            }[way]
            self.door = PrivateStep(
                self.net,
                optimizer=self.optimizer,
                mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(0.5), noise=Gaussian(1.0), steps=6),
                loss_per_example=lambda m, b: m(b[0]).square().sum(1),
                performance=performance,
            )
            self.loader = self.door.batches(DATA)
            self.update = self.door._update
            self.capture = self.door._capture
        else:
            self.door = PrivacyEngine()
            *_, self.loader = self.door.make_private(
                module=self.net,
                optimizer=self.optimizer,
                data_loader=DataLoader(DATA, batch_size=6),
                noise_multiplier=1.0,
                max_grad_norm=0.5,
                loss_reduction="sum",
                grad_sample_mode="hooks" if "hooks" in way else "auto",
            )
            self.update = self.door._watched[0].update
            self.capture = self.door._watched[0].instrument.capture
        release = self.update.noise.release

        def looked_at(clipped: Any, **rest: Any) -> Any:
            found = {name: value.detach().clone() for name, value in clipped.values.items()}
            private = release(clipped, **rest)
            self.sums.append(found)
            return private

        self.update.noise.release = looked_at
        self.moved = 0
        self.values = self._values()

    def _values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]

    def look(self) -> None:
        """Counts a move of the parameters, and requires that no gradient but a private one is there."""
        now = self._values()
        self.moved += not all(map(torch.equal, now, self.values))
        self.values = now
        for p in self.net.parameters():
            shown = getattr(p, "grad_sample", None) is not None  # the promise of the modes that show them
            assert p.grad is None or hasattr(p.grad, "_privet_released") or shown, "p.grad is not private"
        assert self.moved <= self.door._ledger.steps, "moved more often than billed"

    def batches(self) -> Iterator[Tensor]:
        for (x,) in self.loader:
            if len(x):
                yield x

    def step(self, x: Tensor) -> None:
        if self.way.startswith("explicit"):
            self.door([x])
            return
        self.optimizer.zero_grad()
        self.net(x).square().sum().backward()
        self.optimizer.step()

    def steps_on(self, x: Tensor) -> None:
        """Takes steps on a batch of the loader: in virtual steps, on a whole pass of physical batches."""
        if "virtual" not in self.way:
            self.step(x)
            return
        manager = BatchMemoryManager(data_loader=self.loader, max_physical_batch_size=3, optimizer=self.optimizer)
        with manager as parts:
            for place, (part,) in enumerate(parts):
                self.step(part)
                if parts.last and place > 1:
                    break

    def reference(self, x: Tensor) -> Any:
        twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        twin.load_state_dict(self.net.state_dict())
        rows = [(row[None],) for row in x]
        return expected_sum(example_gradients(twin, rows, lambda m, b: m(b[0]).square().sum()), Flat(0.5))

    def looks_ordinary_in_eval(self) -> None:
        """Requires that a forward in eval mode is not captured, and that its output is the plain module's."""
        watching: list[bool] = []
        handle = self.net[0].register_forward_hook(lambda *rest: watching.append(self.capture.watching))
        training = self.net.training
        self.net.eval()
        output = self.net(PROBE)
        self.net.train(training)
        handle.remove()
        assert watching == [False], "a forward in eval mode was captured"
        assert output.shape == (5, 2)

    def next_step_is_right(self) -> None:
        """Requires that a step on a fresh batch is right, after three errors at most that say what to do."""
        for _ in range(4):
            x = next(self.batches())
            self.look()
            expected, before = self.reference(x), len(self.sums)
            try:
                self.step(x)
            except PrivetError:
                self.look()
                self._recover()
                continue
            self.look()
            assert len(self.sums) == before + 1, "one step is one release"
            assert_exact(self.sums[-1], expected)
            return
        raise AssertionError("four errors in a row")

    def _recover(self) -> None:
        """Does what the errors say: takes the step that waits."""
        if not self.way.startswith("explicit"):
            with suppress(PrivetError):
                self.optimizer.step()
            self.look()


WAYS = ("paper", "paper, hooks", "paper, virtual", "explicit", "explicit, two passes", "explicit, in parts")


def lines_of(way: str, *, first: bool) -> int:
    """Returns how many lines a step runs: the first step of a run, with its checks, or a later one."""
    lines = Lines()
    interrupted(way, lines, first=first)
    return lines.seen


def interrupted(way: str, lines: Lines, *, first: bool, then: Callable[[Run], None] | None = None) -> Run:
    """Runs a step under interruption, and then requires what must hold."""
    run = Run(way)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not first:
            run.step(next(run.batches()))
        run.look()
        x = next(run.batches())
        try:
            with lines.running():
                run.steps_on(x)
        except KeyboardInterrupt:
            pass
        if lines.at is not None:
            if then is not None:
                then(run)
            run.look()
            run.looks_ordinary_in_eval()
            run.next_step_is_right()
            run.next_step_is_right()
    return run
