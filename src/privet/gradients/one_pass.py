"""The clipped sum in the least time: one forward, and one backward that keeps every use until all have come.

Axes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from privet.gradients.capture import Capture, Recorded
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.summation import clipped_sum
from privet.gradients.weights import Policy

__all__ = ["Losses", "OnePass", "SumOfBatch"]

Losses = Callable[[Any], Tensor]
"""Runs the model on a batch and returns the loss of each example, (B,)."""


class SumOfBatch(Protocol):
    """A way from a batch to its clipped sum."""

    def clipped_sum(
        self,
        losses: Losses,
        batch: Any,
        *,
        examples: int,
        parameters: Mapping[str, nn.Parameter],
        policy: Policy,
        absent: Tensor | None = None,  # (B,) bool
    ) -> tuple[ClippedSum, Tensor]:  # and the losses, (B,)
        """Returns the clipped sum of the gradients of the examples' losses, and the losses, detached.

        Args:
            losses: of the batch.
            batch: what the losses are of.
            examples: how many they are, those that only fill up included.
            parameters: the trainable parameters by name.
            policy: how much each may weigh.
            absent: which examples only fill up: they add exactly zero, and are not counted as dropped.

        Guarantees:
            As `summation.clipped_sum`: an example whose norm is not finite adds exactly zero, and is counted.
        """


class OnePass:
    """Takes one forward at a time through its backward.

    Args:
        capture: watches the forward; it is released at the end, whatever happens.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture

    def clipped_sum(
        self,
        losses: Losses,
        batch: Any,
        *,
        examples: int,
        parameters: Mapping[str, nn.Parameter],
        policy: Policy,
        absent: Tensor | None = None,  # (B,) bool
    ) -> tuple[ClippedSum, Tensor]:  # and the losses, (B,)
        """Returns the clipped sum and the losses; see `SumOfBatch`."""
        capture = self._capture
        sums: list[ClippedSum] = []

        def received(recorded: Recorded) -> None:
            sums.append(clipped_sum(recorded, parameters, policy, absent=absent))

        before, capture.on_backward = capture.on_backward, received
        try:
            with torch.enable_grad():
                capture.begin(examples)
                found = losses(batch)
                capture.end([found])
                found.sum().backward()  # type: ignore[no-untyped-call]
        except BaseException:
            capture.release()
            raise
        finally:
            capture.on_backward = before
        (total,) = sums
        return total, found.detach()
