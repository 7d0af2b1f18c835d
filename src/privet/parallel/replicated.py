"""Replicated training: every rank holds the whole model, and computes the clipped sum of its share of each batch."""

from __future__ import annotations

from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from privet.gradients.spread import HERE, Spread
from privet.noise import NoiseMechanism
from privet.parallel.agreement import Agreement
from privet.parallel.reduction import Reduced
from privet.parallel.role import fitting

__all__ = ["Replicated", "broadcast"]


def broadcast(value: Tensor, group: dist.ProcessGroup, agreement: Agreement) -> None:
    """Gives a tensor the value that it has on the first rank of a group."""
    # As bytes, which every backend moves, whatever the type and the layout of the tensor.
    raw = value.detach().reshape(-1).clone().view(torch.uint8)
    if raw.numel():
        agreement.guarded(lambda: dist.broadcast(raw, group=group, group_src=0))
        value.copy_(raw.view(value.dtype).view(value.shape))


@final
class Replicated:
    """The whole model on each rank of one process group.

    Args:
        group: moves the sums, on the device of the model.
        agreement: of the same ranks.
    """

    spread: Spread = HERE
    place: tuple[int, int] | None = None

    def __init__(self, group: dist.ProcessGroup, agreement: Agreement) -> None:
        self._group = group
        self._agreement = agreement

    def begin(self, module: nn.Module) -> None:
        """Puts the reducer of DistributedDataParallel to rest, and gives all ranks the values of rank 0.

        The reducer would wait for gradients that never come, since none reaches a parameter before the noise. Its
        buckets stay allocated.
        """
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = False
            module.require_forward_param_sync = False
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                broadcast(value, self._group, self._agreement)

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism whose release is of the sum over all ranks."""
        return Reduced(mechanism, self._group, self._agreement)

    def gradient(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Returns the value in the parameter's shape."""
        return fitting(parameter, value)
