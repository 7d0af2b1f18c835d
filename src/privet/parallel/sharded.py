"""Training in parts: each rank holds a part of each parameter, and gathers the rest, or computes a part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.spread import Spread
from privet.noise import NoiseMechanism, PrivateGradient
from privet.noise.source import Offsets
from privet.parallel.agreement import Agreement
from privet.parallel.forwards import Gathered, Groups
from privet.parallel.layout import Layout
from privet.parallel.replicated import broadcast

__all__ = ["Sharded"]


def _local(value: Tensor) -> Tensor:
    """Returns the own part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


@final
class Sharded:
    """The parts of one module's parameters, on the ranks of one mesh.

    Args:
        module: the user's module.
        layouts: how its trainable parameters lie on the ranks, by name.
        groups: of the ranks.
        agreement: of all ranks.
    """

    def __init__(self, module: nn.Module, layouts: Mapping[str, Layout], groups: Groups, agreement: Agreement) -> None:
        self._modules = [child for child in module.modules() if isinstance(child, FSDPModule)]
        self._layouts = layouts
        self.place = None if groups.same is None else (dist.get_rank(groups.parts), dist.get_world_size(groups.parts))
        self._by_parameter = {id(layout.parameter): layout for layout in layouts.values()}
        self._groups = groups
        self._agreement = agreement
        gathering = [child for child in module.modules() if isinstance(child, FSDPModule)]
        self.spread: Spread = Gathered(gathering, layouts, groups, agreement)

    def begin(self, module: nn.Module) -> None:
        """Puts the reductions of `fully_shard` to rest, and gives all ranks the buffers of rank 0.

        No gradient reaches them; if one did, it would stay on this rank, where the tripwire meets it. Ranks that hold
        the same parts get those of the first of them. Buffers may be in parts, as a plan says or not: ranks that see
        the same examples keep theirs.
        """
        groups = self._groups
        for child in self._modules:
            child.set_requires_gradient_sync(False, recurse=False)
            child.reshard()
        with torch.no_grad():
            for buffer in module.buffers():
                broadcast(_local(buffer), groups.ranks if groups.same is None else groups.parts, self._agreement)
            for p in module.parameters():
                if not isinstance(p, DTensor):
                    broadcast(p, groups.ranks, self._agreement)
                    continue
                if groups.replicas is not None:
                    broadcast(p.to_local(), groups.replicas, self._agreement)
                outside = bool(self._modules) and p.device_mesh.ndim == 1  # of the plan
                if groups.same is not None and (outside or isinstance(p.placements[-1], Replicate)):
                    broadcast(p.to_local(), groups.same, self._agreement)

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism that adds to each part the noise that the whole parameter gets there."""
        return _NoiseOnParts(mechanism, self._layouts, self._groups, self._agreement)

    def gradient(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Returns the own part of a gradient as a distributed tensor."""
        return self._by_parameter[id(parameter)].gradient(value)


@final
class _NoiseOnParts:
    """A noise mechanism of which every rank holds one, whose release is of the parts that the rank holds.

    Guarantees:
        Each element of the sum over ranks gets noise once, of the multiplier times the sensitivity of one example.
        With one key it is the noise of a single process, drawn by its address. Ranks that hold the same parts draw the
        same, and take the values of the first of them, so that no rounding tells them apart.
    """

    def __init__(
        self, inner: NoiseMechanism, layouts: Mapping[str, Layout], groups: Groups, agreement: Agreement
    ) -> None:
        self._inner = inner
        self._pieces: Offsets = {name: layout.pieces() for name, layout in layouts.items()}
        self._groups = groups
        self._copies = {name for name, layout in layouts.items() if layout.split is None}
        self._agreement = agreement

    def release(
        self, clipped_sum: ClippedSum, *, multiplier: float, step: int, offsets: Offsets | None = None
    ) -> PrivateGradient:
        """Returns the private gradient of the own parts, and consumes the sum."""
        sensitivity = clipped_sum.sensitivity
        values = dict(sorted(clipped_sum.take().items()))  # the same order on every rank
        self._over(self._groups.replicas, values, reduce=True)
        own = self._inner.release(
            ClippedSum(values, sensitivity), multiplier=multiplier, step=step, offsets=self._pieces
        )
        noisy = dict(sorted(own.values.items()))
        self._over(self._groups.replicas, noisy, reduce=False)
        # A sum that is whole on several ranks is formed on the first of them.
        self._over(self._groups.same, {n: v for n, v in noisy.items() if n in self._copies}, reduce=False)
        return own

    def _over(self, group: dist.ProcessGroup | None, values: Mapping[str, Tensor], *, reduce: bool) -> None:
        """Adds values up over the ranks of a group, or gives all of them those of the first."""
        if group is None:
            return

        def move() -> None:
            filled = [value for value in values.values() if value.numel()]
            begun = [
                dist.all_reduce(value, group=group, async_op=True)
                if reduce
                else dist.broadcast(value, group=group, group_src=0, async_op=True)
                for value in filled
            ]
            for work in begun:
                assert work is not None
                work.wait()

        self._agreement.guarded(move)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the mechanism, which knows nothing of ranks."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes, from a state of any number of ranks."""
        self._inner.load_state_dict(state)
