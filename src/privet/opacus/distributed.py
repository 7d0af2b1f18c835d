"""Several processes that train one model together, at Opacus's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch import nn

__all__ = ["DifferentiallyPrivateDistributedDataParallel", "average_gradients"]


def average_gradients(model: nn.Module) -> None:
    """Replaces the gradient of every trainable parameter by its mean over all processes."""
    for p in model.parameters():
        if p.requires_grad and p.grad is not None:
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
            p.grad.div_(dist.get_world_size())


class DifferentiallyPrivateDistributedDataParallel(nn.Module):
    """Wraps a model that all processes train together, and gives it the values of the first process.

    Gradients are added up by the private optimizer, after clipping and with the noise, and by nothing before that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            for p in model.parameters():
                dist.broadcast(p.data, 0)
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the model returns."""
        return self.module(*args, **kwargs)
