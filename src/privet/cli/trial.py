"""A model on trial: what the user's factory gave, and one private step of a copy of it.

Three forms are taken: a model; a model and the arguments of its forward; a model, a batch and a loss per example.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.count import count_examples
from privet.clipping import Flat
from privet.errors import ConfigurationError, PrivetError
from privet.mechanism import Mechanism
from privet.noise import Gaussian
from privet.sampling import Poisson
from privet.step import PrivateStep
from privet.validation import find_mixing, validate

__all__ = ["Cost", "Trial", "trial_of"]

_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """What one step of the trial's batch takes.

    Attributes:
        examples: in the batch.
        private: median seconds of a private step.
        plain: median seconds of the same step without privacy.
        mebibytes: by how much memory grew at most in the private steps, where the system tells.
    """

    examples: int
    private: float
    plain: float
    mebibytes: float | None


@dataclass(frozen=True)
class Trial:
    """A model, and what it is tried with: the arguments of its forward, or a batch and its loss per example."""

    model: nn.Module
    batch: Any = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    @property
    def looked_at(self) -> str:
        """Returns how much of a training the factory allows to look at."""
        if self.loss is not None:
            return "classes of the modules, one private step with every check"
        if self.batch is not None:
            return "classes of the modules, examples that meet in the forward"
        return "classes of the modules alone; return a batch and a loss per example too for all checks"

    def issues(self) -> list[str]:
        """Returns why the model cannot be trained privately as it is; nothing is changed."""
        found = [str(issue) for issue in validate(self.model)]
        if found or self.batch is None:
            return found
        if self.loss is None:
            args, kwargs = _arguments(self.batch)
            return find_mixing(self.model, args, kwargs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a training that is none
                self._step()(self.batch)
        except PrivetError as error:
            return [str(error)]
        return []

    def cost(self) -> Cost:
        """Measures steps of a copy of the model, private and plain in turn, after one of each."""
        assert self.loss is not None
        step, plain = self._step(), copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(plain.parameters(), lr=1e-6)

        def plain_step() -> None:
            optimizer.zero_grad()
            assert self.loss is not None
            self.loss(plain, self.batch).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        def private_step() -> None:
            step(self.batch)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = _resident("VmRSS")
            seconds: dict[Callable[[], None], list[float]] = {private_step: [], plain_step: []}
            for turn in range(_REPEATS + 1):
                for run, times in seconds.items():
                    started = time.perf_counter()
                    run()
                    _settled()
                    if turn:  # the first of each warms up, and privet's checks
                        times.append(time.perf_counter() - started)
                if not turn:
                    _forget_peak()
        peak = _resident("VmHWM")
        grown = None if before is None or peak is None else max(peak - before, 0.0)
        private, usual = (statistics.median(times) for times in seconds.values())
        return Cost(count_examples(self.batch, 0, name="the batch"), private, usual, grown)

    def _step(self) -> PrivateStep:
        model = copy.deepcopy(self.model)
        assert self.loss is not None
        return PrivateStep(
            model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-6),
            mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0)),
            loss_per_example=self.loss,
            expected_batch_size=count_examples(self.batch, 0, name="the batch"),
        )


def trial_of(name: str, made: object) -> Trial:
    """Returns the trial of what a factory made.

    Raises:
        ConfigurationError: if it is none of the three forms.
    """
    parts = made if isinstance(made, tuple) else (made,)
    well_formed = 1 <= len(parts) <= 3 and isinstance(parts[0], nn.Module) and (len(parts) < 3 or callable(parts[2]))
    if not well_formed:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ConfigurationError(
            f"{name} returned {kinds}. Expected a model; or a model and the arguments of its forward; or a model, a "
            "batch and loss_per_example(model, batch), which returns one loss for each example."
        )
    return Trial(*parts)


def _arguments(batch: object) -> tuple[tuple[object, ...], Mapping[str, object]]:
    if isinstance(batch, Mapping):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _settled() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident(name: str) -> float | None:
    """Returns a line of the kernel's account of this process, in MiB; None where there is no such account."""
    if sys.platform != "linux":
        return None
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return float(line.split()[1]) / 1024
    return None


def _forget_peak() -> None:
    with suppress(OSError):  # where it is not allowed, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
