"""Private optimizers of processes that train one model together, each on its share of every batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from privet.opacus.optimizers.optimizer import DPOptimizer
from privet.opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from privet.opacus.optimizers.perlayeroptimizer import DPPerLayerOptimizer

__all__ = ["DistributedDPOptimizer", "DistributedDPOptimizerFastGradientClipping", "SimpleDistributedPerLayerOptimizer"]


class DistributedDPOptimizer(DPOptimizer):
    """A `DPOptimizer` of one of several processes: the first adds the noise, and all step on the sum over all.

    `expected_batch_size` is that of one process.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> None:
        super().__init__(optimizer, **kwargs)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    @property
    def gradient_multiplier(self) -> float:
        """Returns the multiplier of this process's noise: the whole noise on the first, none on the others."""
        return super().gradient_multiplier if self.rank == 0 else 0.0

    def add_noise(self) -> None:
        """Bills the step, and puts the sum over all processes, with the noise of the first, into `p.grad`.

        The sums of single processes are added up before this returns: none of them is ever in `p.grad` afterwards.
        """
        super().add_noise()
        try:
            self.reduce_gradients()
        except BaseException:  # the part of this process alone is not private
            self._released = {}
            for p in self.params:
                p.grad = None
            raise

    def reduce_gradients(self) -> None:
        """Adds up the gradients of all processes, in place."""
        for p in self.params:
            assert p.grad is not None
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)

    def scale_grad(self) -> None:
        """Divides `p.grad` by the expected batch size of all processes, where losses are means."""
        super().scale_grad()
        if self.loss_reduction == "mean":
            for p in self.params:
                assert p.grad is not None
                p.grad.div_(self.world_size)


class DistributedDPOptimizerFastGradientClipping(DistributedDPOptimizer, DPOptimizerFastGradientClipping):
    """`DistributedDPOptimizer` for ghost clipping."""


class SimpleDistributedPerLayerOptimizer(DistributedDPOptimizer, DPPerLayerOptimizer):
    """`DistributedDPOptimizer` with a clip norm for every parameter."""
