"""Schedules of the noise multiplier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from privet.opacus.schedulers.scheduler import Exponential, Lambda, Scheduler, Step

__all__ = ["ExponentialNoise", "LambdaNoise", "StepNoise"]


class _NoiseScheduler(Scheduler):
    attribute = "noise_multiplier"

    def get_noise_multiplier(self) -> float:
        """Returns the noise multiplier of the epoch `last_epoch`. Override it for a schedule of your own."""
        return super().value()

    def value(self) -> float:
        """Returns `get_noise_multiplier()`."""
        return self.get_noise_multiplier()


class ExponentialNoise(_NoiseScheduler, Exponential):
    """Multiplies the noise multiplier by `gamma` every epoch."""


class StepNoise(_NoiseScheduler, Step):
    """Multiplies the noise multiplier by `gamma` every `step_size` epochs."""


class LambdaNoise(_NoiseScheduler, Lambda):
    """Multiplies the first noise multiplier by `noise_lambda(epoch)`."""

    def __init__(self, optimizer: Any, *, noise_lambda: Callable[[int], float], last_epoch: int = -1) -> None:
        super().__init__(optimizer, noise_lambda, last_epoch=last_epoch)
