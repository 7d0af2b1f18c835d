"""The clipped sum in the least time: one forward, and one backward that keeps every use until all have come.

Axes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.gradients.capture.anew import agree_on_doubt
from privet.gradients.capture.capture import Capture
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.passes.role import Losses
from privet.gradients.spread import HERE, Spread, spread_sum
from privet.gradients.use import Owner, Recorded
from privet.gradients.weights import Policy

__all__ = ["OnePass"]


class OnePass:
    """Takes one forward at a time through its backward.

    Args:
        capture: watches the forward; it is released at the end, whatever happens.
        spread: the processes that hold the model together.
    """

    def __init__(self, capture: Capture, *, spread: Spread = HERE) -> None:
        self._capture = capture
        self._spread = spread

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
        """Returns the clipped sum and the losses; see `SumOfBatch`."""
        capture, recorded = self._capture, Recorded(examples=examples)
        try:
            with torch.enable_grad():
                capture.begin(examples, recorded, inputs=batch)
                found = losses(batch)
                agree_on_doubt(capture, self._spread)
                capture.end([found])
                found.sum().backward()  # type: ignore[no-untyped-call]
        except BaseException:
            capture.release()
            raise
        met = capture.standing_for(parameters)
        return spread_sum(recorded, met, policy, self._spread, owner=owner, absent=absent), found.detach()
