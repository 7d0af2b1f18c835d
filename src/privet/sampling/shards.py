"""Data in shards, of which a rank reads its own alone: the whole batch is drawn as ever, and dealt by shard.

Every rank draws the batch of all shards from one key. So the law, its ε and the examples of each batch do not depend on
how many ranks there are, nor on who reads which shard. A resumed run with other ranks deals the shards anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset

from privet._checks import check_count
from privet.errors import ConfigurationError
from privet.sampling.reading import ShardedStream
from privet.sampling.share import Share

__all__ = ["ShardShare", "ShardedDataset", "share_of"]


@final
class ShardedDataset(Dataset[Any]):
    """A map-style dataset in shards of known sizes. A shard is opened when its first example is asked for.

    Args:
        sizes: the number of examples in each shard. It is public, and fixed for the whole run.
        open_shard: returns shard s as something with `__getitem__`, such as a memory-mapped array.

    Of W ranks, rank r reads the shards r, r + W, r + 2 W and so on.

    Example:
        >>> data = ShardedDataset(sizes=[2, 3], open_shard=lambda shard: [10 * shard + i for i in range(3)])
        >>> len(data), data[1], data[2]
        (5, 1, 10)

    Raises:
        ConfigurationError: if there is no shard, or one has no example.
    """

    def __init__(self, sizes: Sequence[int], open_shard: Callable[[int], Any]) -> None:
        self.sizes = tuple(check_count("the size of a shard", size, 1) for size in sizes)
        if not self.sizes:
            raise ConfigurationError("sizes must list the size of every shard, got none.")
        self.starts = tuple(accumulate(self.sizes, initial=0))[:-1]
        self._open_shard = open_shard
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of {len(self)} examples")
        shard = bisect_right(self.starts, index) - 1
        if shard not in self._opened:
            self._opened[shard] = self._open_shard(shard)
        return self._opened[shard][index - self.starts[shard]]


@dataclass(frozen=True)
class ShardShare(Share):
    """The examples of a batch that lie in every `ranks`-th shard, from shard `rank` on."""

    starts: tuple[int, ...] = (0,)  # of each shard

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks > len(self.starts):
            raise ConfigurationError(
                f"{len(self.starts)} shards cannot be dealt to {self.ranks} ranks. Expected a shard for each rank at "
                "least. Cut the data into more shards, or train on fewer ranks."
            )

    def of(self, examples: list[int]) -> list[int]:
        """Returns the examples of this share of a batch."""
        if self.ranks == 1:
            return examples
        drawn = np.asarray(examples, dtype=np.int64)
        shards = np.searchsorted(self.starts, drawn, side="right") - 1
        return drawn[shards % self.ranks == self.rank].tolist()  # type: ignore[no-any-return]

    def largest(self, examples: list[int]) -> int:
        """Returns how many examples the largest share of a batch has."""
        drawn = np.asarray(examples, dtype=np.int64)
        shards = np.searchsorted(self.starts, drawn, side="right") - 1
        return int(np.bincount(shards % self.ranks, minlength=1).max())

    @property
    def readable(self) -> int:
        """Returns the first example of the first shard of this rank."""
        return self.starts[self.rank]


def share_of(dataset: object, share: Share) -> Share:
    """Returns a rank's share of the batches of a dataset: by shard where it is in shards."""
    if isinstance(dataset, ShardedStream):
        return dataset.share(share)
    if not isinstance(dataset, ShardedDataset):
        return share
    return ShardShare(rank=share.rank, ranks=share.ranks, together=share.together, starts=dataset.starts)
