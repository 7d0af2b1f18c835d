"""How forwards and sums see a model of which each rank holds a part: see `gradients.spread.Spread`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from privet.batches.tree import mapped
from privet.errors import RanksError
from privet.gradients.spread import Parts
from privet.gradients.summation import LocalNorms, NormReducer, SumSink
from privet.parallel.agreement import Agreement
from privet.parallel.layout import Layout
from privet.parallel.plans import Plans
from privet.parallel.scatter import ScatterSink

__all__ = ["Gathered", "Groups"]

_P = TypeVar("_P")


class Groups:
    """The process groups of a sharded model.

    Args:
        parts: of the ranks between which a parameter is cut.
        replicas: of the ranks that hold the same parts, if there are any.
        ranks: of all ranks.
        same: of the ranks that see the same examples, and compute a part each by a tensor parallel plan, if any do.
    """

    def __init__(
        self,
        parts: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        ranks: dist.ProcessGroup,
        same: dist.ProcessGroup | None = None,
    ) -> None:
        self.parts = parts
        self.replicas = replicas
        self.ranks = ranks
        self.same = same


@final
class _NormsOfParts:
    """Adds up squared norms over the ranks that see the same examples: (K, B) numbers each time."""

    def __init__(self, group: dist.ProcessGroup, agreement: Agreement) -> None:
        self._group = group
        self._agreement = agreement

    def sum(self, squared_norms: Tensor) -> Tensor:
        """Returns the squared norms over the whole model, the same on all of these ranks."""
        total = squared_norms.contiguous().clone()
        if total.numel():
            self._agreement.guarded(lambda: dist.all_reduce(total, group=self._group))
        return total


@final
class Gathered:
    """The model of one module, as this rank sees it.

    Args:
        modules: gather parameters before they run.
        layouts: of the trainable parameters, by name.
        groups: of the ranks.
        agreement: of all ranks.
    """

    collective: bool = True
    parts: Parts | None = None
    norms: NormReducer = LocalNorms()

    def __init__(
        self, modules: Sequence[nn.Module], layouts: Mapping[str, Layout], groups: Groups, agreement: Agreement
    ) -> None:
        self.gathering = modules
        self._layouts = layouts
        self._groups = groups
        self._agreement = agreement
        self._elsewhere: frozenset[str] = frozenset()
        self._same = range(agreement.rank, agreement.rank + 1)  # the ranks that see the examples of this one
        if groups.same is not None:
            split = frozenset(name for name, layout in layouts.items() if layout.split is not None)
            self.parts = Plans(groups.same, agreement, split)
            self.norms = _NormsOfParts(groups.same, agreement)
            size, place = dist.get_world_size(groups.same), dist.get_rank(groups.same)
            # What is whole on all of them is the first one's, whose gradients of it are clipped and released.
            self._elsewhere = frozenset(layouts) - split if place else frozenset()
            self._same = range(agreement.rank - place, agreement.rank - place + size)

    def counted(self, parameters: Mapping[str, _P]) -> Mapping[str, _P]:
        """Returns the parameters of which this rank has a part of its own, and on the first also the whole ones."""
        return {name: p for name, p in parameters.items() if name not in self._elsewhere}

    def require_alike(self, batch: Sequence[Tensor]) -> None:
        """Raises RanksError on all ranks if some that compute parts of the same examples have different ones.

        Row i has to be one example on all of them: its norm is added up over them.
        """
        if self.parts is None:
            return
        with self._agreement.telling():
            own = _checksum(batch)
        found = self._agreement.numbers_at("its batch", own)
        step = len(self._same)
        apart = [
            r
            for first in range(0, len(found), step)
            if len(set(found[first : first + step])) > 1
            for r in range(first, first + step)
        ]
        if apart:
            raise RanksError(
                f"ranks {apart} compute parts of one model for the same examples, and were given different batches. "
                "Expected the same batch on all ranks of a tensor parallel group. Use the private loader, or read the "
                "same data in the same order on each of them."
            )

    def together(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Returns what was found on some rank."""
        if self.parts is None:  # whole gradients of one batch were looked at on all ranks
            return own
        return {name: value for found in self._agreement.objects(dict(own)) for name, value in found.items()}

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
        step = len(self._same)
        for first in range(0, len(sizes), step):  # ranks that see the same examples lie side by side
            mine = sizes[first : first + step]
            if any(mine):
                rank = first + mine.index(max(mine))
                yield self._taken(inputs, packed, rank), max(mine), first == self._same.start

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
        return ScatterSink(self._layouts, names, self._groups.parts, self._agreement, elsewhere=self._elsewhere)


def _checksum(batch: Sequence[Tensor]) -> int:
    """Returns a number that batches which differ by accident do not share, computed where the batch is."""
    total = len(batch)
    for t in batch:
        if t.layout is not torch.strided:
            continue
        raw = t.detach().contiguous().reshape(-1).view(torch.uint8)
        words = F.pad(raw, (0, -len(raw) % 8)).view(torch.int64)
        places = torch.arange(1, 2 * len(words), 2, device=raw.device) * 0x9E3779B97F4A7C1
        total = 31 * total + hash(tuple(t.shape)) + int(((words + 1) * places).sum())
    return total % 2**61


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
