"""Schedules of the clip norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from privet.opacus.schedulers.scheduler import Exponential, Lambda, Scheduler, Step

__all__ = ["ExponentialGradClip", "LambdaGradClip", "StepGradClip"]


class _GradClipScheduler(Scheduler):
    attribute = "max_grad_norm"

    def get_max_grad_norm(self) -> float:
        """Returns the clip norm of the epoch `last_epoch`. Override it for a schedule of your own."""
        return super().value()

    def value(self) -> float:
        """Returns `get_max_grad_norm()`."""
        return self.get_max_grad_norm()


class ExponentialGradClip(_GradClipScheduler, Exponential):
    """Multiplies the clip norm by `gamma` every epoch."""


class StepGradClip(_GradClipScheduler, Step):
    """Multiplies the clip norm by `gamma` every `step_size` epochs."""


class LambdaGradClip(_GradClipScheduler, Lambda):
    """Multiplies the first clip norm by `scheduler_function(epoch)`."""

    def __init__(self, optimizer: Any, *, scheduler_function: Callable[[int], float], last_epoch: int = -1) -> None:
        super().__init__(optimizer, scheduler_function, last_epoch=last_epoch)
