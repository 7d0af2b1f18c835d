"""One module made private at the paper's door: its instrument, its update, and the loss that they expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from privet.batches.kept import opening
from privet.errors import ProtocolError
from privet.gradients.capture.instrument import Instrument
from privet.gradients.capture.loss_watch import LossWatch
from privet.gradients.spread import spread_sum
from privet.gradients.use import Recorded
from privet.parallel.mesh import refuse_late_wrapper
from privet.training.loss_scale import LossScale
from privet.training.materialised import Materialised, clear_with_zero_grad
from privet.training.once import Making
from privet.training.thawed import admit
from privet.training.update import PrivateUpdate
from privet.training.virtual_steps import in_virtual_steps
from privet.training.whose import Whose
from privet.validation import refuse_mixing

__all__ = ["MODES_ELSEWHERE", "GradSampleMode", "PrivateModule", "modes"]

GradSampleMode = Literal["auto", "hooks", "functorch"]
_MODES: dict[GradSampleMode, tuple[bool, bool]] = {
    "auto": (False, False),
    "hooks": (True, False),
    "functorch": (True, True),
}
"""By name: whether per-example gradients are shown on the parameters, and whether all of them come from vmap."""
MODES_ELSEWHERE = {
    "ghost": "'auto' is ghost clipping, with the loss of your own",
    "ew": "'auto' takes its place",
    "no_op": "it would not clip",
}
"""Modes of Opacus, and what takes their place."""


def modes() -> tuple[str, ...]:
    """Returns the names of all modes."""
    return get_args(GradSampleMode)


class PrivateModule:
    """Turns the backwards of one module into sums for its update.

    Args:
        module: the user's module, which is watched from now on.
        update: takes the sums.
        batch_first: whether inputs have the batch on axis 0, else on axis 1.
        loss_divisor: what the loop divides a loss by that is a mean over the rows of the batch: 1 where it does not
            accumulate. None for a loss that is a sum.
        making: how it is made private.
        mode: how per-example gradients are computed, and whether they are shown.
        expects_criterion: whether the loss must be one of a private criterion.
        grad_scaler: what the loop scales losses with.
    """

    def __init__(
        self,
        module: nn.Module,
        update: PrivateUpdate,
        *,
        batch_first: bool,
        loss_divisor: int | None,
        making: Making,
        mode: GradSampleMode,
        expects_criterion: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        shown, mapped = _MODES[mode]
        self.module = module
        self.update = update
        self.materialised = Materialised(update) if shown else None
        self._loss_divisor = loss_divisor
        self.making = making
        self._loss_scale = None if grad_scaler is None else LossScale(grad_scaler, update)
        self._undo: list[Callable[[], None]] = []
        self._axis = 0 if batch_first else 1
        self.losses = LossWatch(
            mean=loss_divisor is not None,
            axis=self._axis,
            expects_criterion=expects_criterion,
            divided_by=loss_divisor or 1,
        )
        self.instrument = Instrument(
            module,
            update.parameters,
            batch_first=batch_first,
            mapped=mapped,
            on_backward=self._received,
            admit=lambda found: admit(module, update, making, found),
            on_check=self._checked,
            losses=self.losses,
            running=update.ranks.running,
            spread=update.ranks.spread,
            on_forward=lambda tensors, anew: update.recognize(tensors, anew=anew),
        )

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises if the module was wrapped since it was made private, or if its forward mixes examples."""
        refuse_late_wrapper()
        refuse_mixing(opening(self.module, (args, kwargs)), args, kwargs, batch_axis=self._axis)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the optimizer's steps release, and guards `zero_grad`: no gradient is lost in silence."""
        self.update.attach(self.module, optimizer)
        optimizer.zero_grad(set_to_none=True)
        guarded, before = self._guarded(optimizer.zero_grad), vars(optimizer).get("zero_grad")
        self._undo.append(lambda: _put_back(self.update.optimizer, guarded, before))
        optimizer.zero_grad = guarded  # type: ignore[method-assign]
        if self._loss_scale is not None:
            self._loss_scale.attach()
            self._undo.append(self._loss_scale.detach)
        if self.materialised is not None:
            self._undo += [
                self.materialised.remove,
                clear_with_zero_grad(self.module, self.update.refuse_zero_grad),
            ]
        self.update.on_forget(self.instrument.capture.release)

    def detach(self) -> None:
        """Makes module and optimizer ordinary ones again.

        Raises:
            ProtocolError: inside a logical step. Nothing is changed then.
        """
        optimizer = self.update.optimizer
        if optimizer is not None and in_virtual_steps(optimizer):
            raise ProtocolError(
                "detach() was called inside of a BatchMemoryManager. Expected it after the `with` block. Leave the "
                "block first."
            )
        self.update.detach()
        self.instrument.remove()
        for undo in self._undo:
            undo()

    def _guarded(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        def guarded(set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - torch's own signature
            self.update.refuse_zero_grad()
            zero_grad(set_to_none=set_to_none)
            if self.materialised is not None and not self.update.detached:
                self.materialised.clear()

        return guarded

    def _received(self, recorded: Recorded) -> None:
        with self.update.ranks.telling():
            self._receive(recorded)

    def _receive(self, recorded: Recorded) -> None:
        examples = recorded.examples or 0
        scale = 1.0 if self._loss_divisor is None else float(max(examples, 1) * self._loss_divisor)
        if self._loss_scale is not None:
            scale /= self._loss_scale.taken()
        if self.materialised is not None:
            self.materialised.keep(recorded, scale=scale)
            return
        trainable = [name for name, p in self.update.parameters.items() if p.requires_grad]
        met, spread = self.instrument.capture.standing_for(trainable), self.update.ranks.spread
        owner = Whose(self.update, examples).owner(0, examples)
        clipped = spread_sum(recorded, met, self.update.mechanism.clipping, spread, scale=scale, owner=owner)
        self.update.receive(clipped, examples=examples)


def _put_back(optimizer: torch.optim.Optimizer | None, guarded: Any, before: Any) -> None:
    """Makes an optimizer's `zero_grad` what it was before. What was wrapped around it since stays, and is harmless."""
    if optimizer is not None and vars(optimizer).get("zero_grad") is guarded:
        if before is None:
            del optimizer.zero_grad
        else:
            optimizer.zero_grad = before  # type: ignore[method-assign]
