"""Sharded training (`fully_shard`): every rank holds a part of each parameter, and gathers the rest to compute."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import PackedSequence

from privet.batches.tree import mapped
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.spread import Spread
from privet.gradients.summation import SumSink
from privet.noise import NoiseMechanism, PrivateGradient
from privet.noise.source import Offsets
from privet.parallel.agreement import Agreement
from privet.parallel.layout import Layout
from privet.parallel.replicated import broadcast
from privet.parallel.scatter import ScatterSink

__all__ = ["Groups", "Sharded"]


class Groups:
    """The process groups of a sharded model.

    Args:
        parts: of the ranks between which a parameter is cut.
        replicas: of the ranks that hold the same parts, if there are any.
        ranks: of all ranks.
    """

    def __init__(self, parts: dist.ProcessGroup, replicas: dist.ProcessGroup | None, ranks: dist.ProcessGroup) -> None:
        self.parts = parts
        self.replicas = replicas
        self.ranks = ranks


@final
class _Gathered:
    """How forwards and sums see a sharded model: see `gradients.spread.Spread`."""

    collective: bool = True

    def __init__(
        self, modules: Sequence[nn.Module], layouts: Mapping[str, Layout], groups: Groups, agreement: Agreement
    ) -> None:
        self.gathering = modules
        self._layouts = layouts
        self._groups = groups
        self._agreement = agreement

    def most(self, own: int) -> int:
        """Returns the largest number of all ranks."""
        return max(self._agreement.numbers_at("the number of its forwards", own))

    def looked_at(self, inputs: Any, examples: int, *, due: bool) -> tuple[Any, int] | None:
        """Returns the batch of the rank that has most examples, among those where a check is due, on every rank.

        With one batch on all of them, a check runs as many forwards on each.
        """
        packed, sizes = self._offered(inputs, examples, due=due)
        if not any(sizes):
            return None
        return self._taken(inputs, packed, sizes.index(max(sizes))), max(sizes)

    def in_turn(self, inputs: Any, examples: int, *, due: bool) -> Iterator[tuple[Any, int, bool]]:
        """Yields the batches of all ranks that want theirs looked at, on every rank."""
        packed, sizes = self._offered(inputs, examples, due=due)
        for rank, size in enumerate(sizes):
            if size:
                yield self._taken(inputs, packed, rank), size, rank == self._agreement.rank

    def _offered(self, inputs: Any, examples: int, *, due: bool) -> tuple[bytes, list[int]]:
        """Returns the own batch to be sent, and the number of examples of every rank whose batch is due."""
        with self._agreement.telling():
            packed = pickle.dumps(_on(torch.device("cpu"), inputs)) if due else b""
        return packed, self._agreement.numbers_at("a check of its batch", examples if due else 0)

    def _taken(self, inputs: Any, packed: bytes, rank: int) -> Any:
        """Returns the batch of one rank, on the device of the own."""
        sent = self._agreement.from_rank(rank, packed)
        return _on(_device_of(inputs), pickle.loads(sent))  # noqa: S301 - it is of a rank of this very run

    def sink(self, names: Sequence[str]) -> SumSink:
        """Returns a sink that keeps the own parts of the sums over all ranks."""
        return ScatterSink(self._layouts, names, self._groups.parts, self._agreement)


def _device_of(inputs: Any) -> torch.device:
    """Returns the device of the first tensor of a batch."""
    found: list[torch.device] = []

    def look(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf.device)
        return leaf

    mapped(inputs, look, "the inputs")
    return found[0] if found else torch.device("cpu")


def _on(device: torch.device, inputs: Any) -> Any:
    """Returns a batch with its tensors, detached, on a device."""

    def move(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().to(device)
        return leaf.to(device) if isinstance(leaf, PackedSequence) else leaf  # type: ignore[arg-type]

    return mapped(inputs, move, "the inputs")


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
        self._by_parameter = {id(layout.parameter): layout for layout in layouts.values()}
        self._groups = groups
        self._agreement = agreement
        gathering = [child for child in module.modules() if isinstance(child, FSDPModule)]
        self.spread: Spread = _Gathered(gathering, layouts, groups, agreement)

    def begin(self, module: nn.Module) -> None:
        """Puts the reductions of `fully_shard` to rest, and gives all ranks the buffers of rank 0.

        No gradient reaches them; if one did, it would stay on this rank, where the tripwire meets it. Ranks that hold
        the same parts get those of the first of them.
        """
        for child in self._modules:
            child.set_requires_gradient_sync(False, recurse=False)
            child.reshard()
        with torch.no_grad():
            for buffer in module.buffers():
                broadcast(buffer, self._groups.ranks, self._agreement)
            for p in module.parameters():
                if not isinstance(p, DTensor):
                    broadcast(p, self._groups.ranks, self._agreement)
                elif self._groups.replicas is not None:
                    broadcast(p.to_local(), self._groups.replicas, self._agreement)

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
        self._replicas = groups.replicas
        self._agreement = agreement

    def release(
        self, clipped_sum: ClippedSum, *, multiplier: float, step: int, offsets: Offsets | None = None
    ) -> PrivateGradient:
        """Returns the private gradient of the own parts, and consumes the sum."""
        sensitivity = clipped_sum.sensitivity
        values = dict(sorted(clipped_sum.take().items()))  # the same order on every rank
        self._over_replicas(values, reduce=True)
        own = self._inner.release(
            ClippedSum(values, sensitivity), multiplier=multiplier, step=step, offsets=self._pieces
        )
        self._over_replicas(dict(sorted(own.values.items())), reduce=False)
        return own

    def _over_replicas(self, values: Mapping[str, Tensor], *, reduce: bool) -> None:
        """Adds values up over the ranks that hold the same parts, or gives all of them those of the first."""
        group = self._replicas
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
