"""The sum over all ranks, with noise, in buckets: reduce-scatter, noise on the own slice, all-gather.

W ranks, N elements of one type in the model's order, padded to a multiple of W.

    flat (W, N / W)      every rank's own clipped sums, one row a slice
    reduce-scatter       rank r gets row r of the sum over ranks
    noise                rank r draws it for its row alone, by the address of each element: 1 / W of the drawing
    all-gather           every rank gets all rows, bit by bit the same

These are the bytes of one all-reduce. A slice without noise is never sent, and no rank holds another one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor

from privet.gradients.clipped_sum import ClippedSum
from privet.noise import NoiseMechanism, PrivateGradient
from privet.noise.source import Offsets
from privet.parallel.agreement import Agreement

__all__ = ["BUCKET_BYTES", "Reduced", "Run", "backend_of", "exchanges", "runs_of_slice"]

BUCKET_BYTES = 25 * 2**20
"""What one collective moves: large enough for the bandwidth of a network, small enough to overlap with its copies."""

# The newer names of the same functions, where torch has them.
_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Run(NamedTuple):
    """Consecutive elements of one parameter that lie in one slice."""

    name: str
    start: int  # of its first element, in the slice
    offset: int  # of its first element, in the parameter
    size: int


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Returns the name of the backend that moves tensors of a device, such as "gloo" or "nccl"."""
    # A group may have a backend for each kind of device: "cpu:gloo,cuda:nccl".
    kinds = dict(part.split(":", 1) for part in dist.get_backend_config(group).split(",") if ":" in part)
    return kinds.get(device.type, dist.get_backend(group))


def exchanges(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Returns whether ranks exchange slices and add them up themselves: gloo's reduce-scatter sends twice the bytes."""
    return backend_of(group, device) == "gloo"


def runs_of_slice(sizes: Mapping[str, int], *, first: int, length: int) -> Iterator[Run]:
    """Yields what lies in the slice of `length` elements from element `first` on of parameters laid end to end."""
    start = 0
    for name, size in sizes.items():
        low, high = max(start, first), min(start + size, first + length)
        if low < high:
            yield Run(name, low - first, low - start, high - low)
        start += size


class _Flat:
    """The parameters of one type on one device, end to end, in as many slices as there are ranks."""

    def __init__(self, values: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        self._group = group
        self._shapes = {name: value.shape for name, value in values.items()}
        self._sizes = {name: value.numel() for name, value in values.items()}
        self._rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        parts = [value.reshape(-1) for value in values.values()]
        total = sum(self._sizes.values())
        self._length = max(1, -(-total // ranks))
        parts.append(parts[0].new_zeros(self._length * ranks - total))
        # New memory in each step: p.grad of the step before are views of the old, and a secret sum must not show there.
        self._all = torch.cat(parts).view(ranks, self._length)
        self.mine = torch.empty_like(self._all[0])

    def _buckets(self) -> Iterator[slice]:
        """Yields the columns of each bucket."""
        columns = max(1, BUCKET_BYTES // (self._all.element_size() * len(self._all)))
        for start in range(0, self._length, columns):
            yield slice(start, min(start + columns, self._length))

    def reduce(self) -> list[Callable[[], None]]:
        """Begins to sum the own slice over all ranks, and returns what ends each bucket."""
        begin = self._begin_exchange if exchanges(self._group, self._all.device) else self._begin_scatter
        return [begin(self._all[:, columns].contiguous().view(-1), self.mine[columns]) for columns in self._buckets()]

    def _begin_scatter(self, bucket: Tensor, mine: Tensor) -> Callable[[], None]:
        work = _SCATTER(mine, bucket, group=self._group, async_op=True)

        def end(_read_until_then: Tensor = bucket) -> None:
            work.wait()

        return end

    def _begin_exchange(self, bucket: Tensor, mine: Tensor) -> Callable[[], None]:
        theirs = torch.empty_like(bucket)
        work: Any = dist.all_to_all_single(theirs, bucket, group=self._group, async_op=True)

        def end(_read_until_then: Tensor = bucket) -> None:
            work.wait()
            torch.sum(theirs.view(len(self._all), -1), 0, out=mine)

        return end

    def runs(self) -> Iterator[Run]:
        """Yields what lies in the own slice."""
        return runs_of_slice(self._sizes, first=self._rank * self._length, length=self._length)

    def gather(self) -> dict[str, Tensor]:
        """Returns all slices of all ranks, as the parameters' own shapes."""
        begun = []
        for columns in self._buckets():
            part = self.mine[columns].contiguous()
            whole = part.new_empty(len(self._all) * len(part))
            begun.append((columns, whole, _GATHER(whole, part, group=self._group, async_op=True)))
        for columns, whole, work in begun:
            work.wait()
            self._all[:, columns] = whole.view(len(self._all), -1)
        flat, start, found = self._all.view(-1), 0, {}
        for name, size in self._sizes.items():
            found[name] = flat[start : start + size].view(self._shapes[name])
            start += size
        return found


@final
class Reduced:
    """A noise mechanism of which every rank holds one, whose release is of the sum over all of them.

    Args:
        inner: adds the noise to the slice of this rank.
        group: of the ranks, whose backend moves the sums.
        agreement: of the same ranks.

    Guarantees:
        Each element of the sum over ranks gets noise once, from one rank, of the multiplier times the sensitivity of
        one example, which is in the share of one rank alone. With one key the noise is the one of a single process.
    """

    def __init__(self, inner: NoiseMechanism, group: dist.ProcessGroup, agreement: Agreement) -> None:
        self._inner = inner
        self._group = group
        self._agreement = agreement

    def release(
        self, clipped_sum: ClippedSum, *, multiplier: float, step: int, offsets: Offsets | None = None
    ) -> PrivateGradient:
        """Returns the private gradient of all ranks, the same on each of them, and consumes the sum."""
        return self._agreement.guarded(lambda: self._release(clipped_sum, multiplier=multiplier, step=step))

    def _release(self, clipped_sum: ClippedSum, *, multiplier: float, step: int) -> PrivateGradient:
        sensitivity = clipped_sum.sensitivity
        kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, value in sorted(clipped_sum.take().items()):  # the same order on every rank
            kinds.setdefault((value.device, value.dtype), {})[name] = value
        flats = [_Flat(kind, self._group) for kind in kinds.values()]
        for end in [end for flat in flats for end in flat.reduce()]:
            end()
        slices: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for flat in flats:
            for run in flat.runs():
                slices[run.name] = flat.mine[run.start : run.start + run.size]
                starts[run.name] = run.offset
        own = self._inner.release(ClippedSum(slices, sensitivity), multiplier=multiplier, step=step, offsets=starts)
        for name, noisy in own.values.items():
            if noisy is not slices[name]:  # a mechanism need not work in place
                slices[name].copy_(noisy)
        gathered = [flat.gather() for flat in flats]
        values = {name: value for each in gathered for name, value in each.items()}
        return own.assembled(values)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the mechanism, which knows nothing of ranks."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes, from a state of any number of ranks."""
        self._inner.load_state_dict(state)
