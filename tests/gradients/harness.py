"""Runs a model once under capture. The micro-batch reference to compare with is in `tests/contracts/doors.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from privet.batches.grow import one_of_zeros
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import learn_layouts
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded

Loss = Callable[[nn.Module, Any], Tensor]  # per example, (B,)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def recorded_of(module: nn.Module, batch: tuple[Tensor, ...], loss: Loss, *, learn: bool = True) -> Recorded:
    """Returns what capture records for one batch, layouts learned first from two sizes of it."""
    size = len(batch[0])
    capture, recorded = Capture(trainable(module)), Recorded(examples=size)
    if learn:
        some, count = (batch, size) if size else (one_of_zeros(batch, axis=0), 1)
        told = learn_layouts(capture, lambda b: (loss(module, b),), some, examples=count)
        capture.tell(told if size else None)  # as of a batch that was in doubt
    capture.begin(size, recorded)
    losses = loss(module, batch)
    capture.end()
    losses.sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is None, f"{name} has a gradient that was not captured"
    return recorded


def captured_sum(module: nn.Module, batch: tuple[Tensor, ...], loss: Loss, policy: Any) -> dict[str, Tensor]:
    return dict(clipped_sum(recorded_of(module, batch, loss), trainable(module), policy).values)
