"""The role that every pass fills: a way from a batch to its clipped sum.

Axes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.use import Owner
from privet.gradients.weights import Policy

__all__ = ["Losses", "SumOfBatch"]

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
        owner: Owner | None = None,
    ) -> tuple[ClippedSum, Tensor]:  # and the losses, (B,)
        """Returns the clipped sum of the gradients of the examples' losses, and the losses, detached.

        Args:
            losses: of the batch.
            batch: what the losses are of.
            examples: how many they are, those that only fill up included.
            parameters: the trainable parameters by name.
            policy: how much each may weigh.
            absent: which examples only fill up: they add exactly zero, and are not counted as dropped.
            owner: the unit of privacy of each example, such as its user; by default each example is one.

        Guarantees:
            As `summation.clipped_sum`: an example whose norm is not finite adds exactly zero, and is counted.
        """
