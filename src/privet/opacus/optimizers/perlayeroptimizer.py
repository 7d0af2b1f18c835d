"""Clipping with a clip norm for every parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from privet.clipping import ClippingPolicy, GroupWise
from privet.opacus.optimizers.optimizer import DPOptimizer, params

__all__ = ["DPPerLayerOptimizer"]


class DPPerLayerOptimizer(DPOptimizer):
    """A `DPOptimizer` in which `max_grad_norm` is a list: the clip norm of each parameter, in order.

    The noise follows the root of the sum of their squares, which `max_grad_norm` then is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: Sequence[float],
        expected_batch_size: float | None,
        **kwargs: Any,
    ) -> None:
        given: object = max_grad_norm
        if not isinstance(given, Sequence) or len(given) != len(params(optimizer)):
            raise ValueError(
                f"max_grad_norm must be a list of one clip norm for each of {len(params(optimizer))} trainable "
                f"parameters, got {max_grad_norm!r}."
            )
        self.max_grad_norms = list(max_grad_norm)
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=math.hypot(*self.max_grad_norms),
            expected_batch_size=expected_batch_size,
            **kwargs,
        )

    @property
    def clipping_policy(self) -> ClippingPolicy:
        """Returns a policy of one group for each parameter."""
        norms = zip(self.named, self.max_grad_norms, strict=True)
        return GroupWise({name: float(norm) for name, norm in norms}, {name: [name] for name in self.named})
