"""A GradScaler beside private training: its scale is a public constant, and cancels before any norm is taken.

    what the user writes              what happens
    scaler.scale(loss).backward()     the recorded gradients are those of S times the loss: they are divided by S
    scaler.unscale_(optimizer)        bills the step, and puts its private gradient into p.grad, where it may be clipped
    scaler.step(optimizer)            does so if it was not done, and steps, always
    scaler.update()                   keeps the scale

Guarantees
----------
S is a power of two, so that it cancels without rounding. An example whose scaled gradient overflows has no finite norm:
it adds nothing, as everywhere. The scale does not adapt: whether an example overflowed is secret, and a released
gradient, which holds no such example, never does. A step that was skipped for an overflow would tell of it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from privet.errors import ConfigurationError, ProtocolError
from privet.training.update import PrivateUpdate

__all__ = ["LossScale", "check_scaler", "power_of_two"]


class LossScale:
    """Follows one GradScaler for the steps of one optimizer.

    Args:
        scaler: the scaler that the user's loop scales the loss with.
        update: turns the sums of the optimizer's module into private gradients.

    Raises:
        ConfigurationError: if it is no GradScaler, or its scale is no power of two.
    """

    def __init__(self, scaler: torch.amp.GradScaler, update: PrivateUpdate) -> None:
        self._scaler = scaler
        self._update = update
        self._now: float | None = None  # the scale of the loss whose backward is to come
        self._unscaled = False  # whether the step's gradient was released already
        self._enabled = scaler.is_enabled()
        self._own_unscale: Callable[[torch.optim.Optimizer], None] = scaler.unscale_
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Puts this object between the user's calls of the scaler and its own methods."""
        if not self._enabled:
            return
        for name, ours in {
            "scale": self._scale, "unscale_": self._unscale, "step": self._step, "update": self._keep,
        }.items():  # fmt: skip
            self._replace(name, ours)

    def _replace(self, name: str, ours: Callable[..., Any]) -> None:
        original, before = getattr(self._scaler, name), vars(self._scaler).get(name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) if self._update.detached else ours(original, *args, **kwargs)

        def undo() -> None:
            if vars(self._scaler).get(name) is replaced:
                if before is None:
                    delattr(self._scaler, name)
                else:
                    setattr(self._scaler, name, before)

        setattr(self._scaler, name, replaced)
        self._undo.append(undo)

    def detach(self) -> None:
        """Gives the scaler its own methods back."""
        for undo in self._undo:
            undo()

    def taken(self) -> float:
        """Returns what the loss of the backward that has ended was multiplied by.

        Raises:
            ProtocolError: if it was not scaled.
        """
        if not self._enabled:
            return 1.0
        now, self._now = self._now, None
        if now is None:
            raise ProtocolError(
                "grad_scaler= was given to make_private, and the loss of this backward was not scaled by it: its "
                "gradients would be taken for smaller ones. Expected scaler.scale(loss).backward(). Or leave "
                "grad_scaler= away."
            )
        return now

    # -- what the user calls -----------------------------------------------------------------------------------------

    def _scale(self, scale: Callable[..., Any], outputs: Any) -> Any:
        self._now = power_of_two(self._scaler.get_scale())
        return scale(outputs)

    def _unscale(self, unscale: Callable[..., None], optimizer: torch.optim.Optimizer) -> None:
        if optimizer is not self._update.optimizer:
            unscale(optimizer)
        elif not self._update.unfinished:  # else nothing is released yet
            self._update.hooks.release_early(optimizer)
            size = power_of_two(self._scaler.get_scale())
            for p in self._update.parameters.values():
                if p.grad is not None:  # scaled by a power of two and back, by the scaler's own hand
                    p.grad.mul_(size)
            unscale(optimizer)
            self._unscaled = True

    def _step(self, step: Callable[..., Any], optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if optimizer is not self._update.optimizer:
            return step(optimizer, *args, **kwargs)
        if self._update.unfinished:
            return optimizer.step(*args, **kwargs)
        if not self._unscaled:
            self._unscale(self._own_unscale, optimizer)
        self._unscaled = False
        return optimizer.step(*args, **kwargs)  # not by the scaler, which skips steps by what it finds

    def _keep(self, update: Callable[..., None], new_scale: Any = None) -> None:
        update(float(power_of_two(float(self._scaler.get_scale() if new_scale is None else new_scale))))


def power_of_two(scale: float) -> float:
    """Returns a scale, or raises if it does not cancel without rounding."""
    if not math.isfinite(scale) or scale <= 0.0 or math.frexp(scale)[0] != 0.5:
        raise ConfigurationError(
            f"the scale of the GradScaler is {scale!r}, which does not cancel without rounding. Expected a power of "
            "two. Give it init_scale=2.0**16, say."
        )
    return scale


def check_scaler(scaler: object) -> torch.amp.GradScaler | None:
    """Returns a GradScaler or None, or raises ConfigurationError for anything else."""
    if scaler is None:
        return None
    if not isinstance(scaler, torch.amp.GradScaler):
        raise ConfigurationError(f"grad_scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}.")
    if scaler.is_enabled():
        power_of_two(scaler.get_scale())
    return scaler
