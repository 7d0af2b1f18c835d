"""Reading of streams in order: as a dataset whose record `i` is the one that comes at place i of a pass.

what the loader asks for                      what is done
the next record                               it is read
the first record again                        another pass begins: the stream is opened again
a record further on, right after the opening  the records before it are read and thrown away (a resumed run)
anything else, in a stream of the user's own  refused: it is read at two places at once
a record that does not come                   refused: the stream is shorter than declared
the last record, and one more comes           refused before that record is handed over: it is longer
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, IterableDataset

from privet._checks import check_count
from privet.errors import ConfigurationError, ProtocolError
from privet.sampling.base import Sampling
from privet.sampling.share import Share
from privet.sampling.stream import Stream

__all__ = ["RecordsInOrder", "ShardedStream", "in_order", "is_stream"]

_NONE = object()


class _Reader:
    """One stream that is open at one place: a shard, or the whole."""

    def __init__(self, open_stream: Callable[[], Iterable[Any]], size: int, name: str, *, once: bool) -> None:
        self._open, self._size, self._name = open_stream, size, name
        self._once = once  # whether a jump is refused, once records were read
        self._iterator: Iterator[Any] | None = None
        self._next = 0
        self._first: Any = _NONE  # until the second record is read: a loader looks at the structure of the first
        self._process = os.getpid()

    def __getitem__(self, place: int) -> Any:
        if os.getpid() != self._process:  # a worker: the parent's iterator may share an open file with it
            self._close()
        if place == 0 and self._first is not _NONE:
            return self._first
        if place == 0 or self._iterator is None or (place < self._next and not self._once):
            self._begin()
        elif place != self._next and self._once:
            raise ProtocolError(
                f"record {place} of {self._name} was asked for, and record {self._next} comes next: it is read at two "
                "places at once. Expected one iteration at a time. End a pass before the next one begins."
            )
        while self._next < place:
            self._advance()
        record = self._advance()
        self._first = record if place == 0 else _NONE
        if place == self._size - 1:
            self._require_end()
            self._close()
        return record

    def _begin(self) -> None:
        self._close()
        self._iterator = iter(self._open())

    def _close(self) -> None:
        self._iterator, self._next, self._first, self._process = None, 0, _NONE, os.getpid()

    def _advance(self) -> Any:
        assert self._iterator is not None
        record = next(self._iterator, _NONE)
        if record is _NONE:
            read = self._next
            self._close()
            raise ProtocolError(
                f"{self._name} ended after {read} records, and {self._size} are declared. Expected all of them in "
                "every pass, in one process: a stream that deals records to workers (get_worker_info) "
                "gives a part here, and a generator gives nothing when it is read again. The batch is not given. "
                "Declare the number of records that come, and give a stream that can be read from its start."
            )
        self._next += 1
        return record

    def _require_end(self) -> None:
        assert self._iterator is not None
        if next(self._iterator, _NONE) is not _NONE:
            self._close()
            raise ProtocolError(
                f"{self._name} goes on after the {self._size} records that are declared. Expected its end there, since "
                "a record that comes twice may be among them. The batch was not handed over. Declare the number of "
                "records that come, or cut the stream to it (itertools.islice)."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_iterator": None, "_next": 0, "_first": _NONE}


@final
class RecordsInOrder(Dataset[Any]):
    """A stream of the user's own as a dataset that is read in order, in one process.

    Args:
        stream: an `IterableDataset`, or another iterable. Each pass asks it for a new iterator.
        records: how many records a pass has.
    """

    def __init__(self, stream: Iterable[Any], records: int) -> None:
        self.stream = stream
        self._records = check_count("records", records, 1)
        self._reader = _Reader(self._opened, records, f"the stream {type(stream).__name__}", once=True)

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, place: int) -> Any:
        return self._reader[place]

    def _opened(self) -> Iterable[Any]:
        return self.stream


@final
class ShardedStream(Dataset[Any]):
    """Shards that can only be read from their beginning, as one stream in a fixed order, for any workers and ranks.

    Place after place goes to the next shard that has records left. So a batch is of all shards alike, each rank reads
    its own shards alone (of W ranks, rank r reads the shards r, r + W, r + 2 W and so on), and the batches do not
    depend on the number of workers or ranks. Train on it with `sampling=Stream(...)`.

    Args:
        sizes: the number of records in each shard. It is public, and fixed for the whole run.
        open_shard: returns an iterable over shard s. It must give the same records in the same order each time, in
            whatever process, and must not deal them to workers or ranks itself.

    Example:
        >>> data = ShardedStream(sizes=[2, 3], open_shard=lambda shard: (10 * shard + i for i in range(2 + shard)))
        >>> [data[place] for place in range(len(data))]
        [0, 10, 1, 11, 12]

    Raises:
        ConfigurationError: if there is no shard, or one has no record.
    """

    def __init__(self, sizes: Sequence[int], open_shard: Callable[[int], Iterable[Any]]) -> None:
        self.sizes = tuple(check_count("the size of a shard", size, 1) for size in sizes)
        if not self.sizes:
            raise ConfigurationError("sizes must list the size of every shard, got none.")
        self._open_shard = open_shard
        self._readers: dict[int, _Reader] = {}
        # In a level the same shards are active: a new one begins where a shard has run out.
        rows = [0, *sorted(set(self.sizes))]
        self._rows = rows[:-1]  # the row at which each level begins
        self._active = [np.flatnonzero(np.asarray(self.sizes) > row) for row in self._rows]
        self._starts = list(
            accumulate(((b - a) * len(m) for a, b, m in zip(rows, rows[1:], self._active, strict=False)), initial=0)
        )[:-1]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, place: int) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} is outside of {len(self)} records")
        level = bisect_right(self._starts, place) - 1
        row, column = divmod(place - self._starts[level], len(self._active[level]))
        shard = int(self._active[level][column])
        if shard not in self._readers:
            self._readers[shard] = _Reader(
                lambda: self._open_shard(shard), self.sizes[shard], f"shard {shard} of the stream", once=False
            )
        return self._readers[shard][self._rows[level] + row]

    def shards_of(self, places: Sequence[int]) -> npt.NDArray[np.int64]:
        """Returns the shard of each place: shape (m,)."""
        found = np.empty(len(places), dtype=np.int64)
        wanted = np.asarray(places, dtype=np.int64)
        levels = np.searchsorted(self._starts, wanted, side="right") - 1
        for level in np.unique(levels):
            here = levels == level
            active = self._active[level]
            found[here] = active[(wanted[here] - self._starts[level]) % len(active)]
        return found

    def share(self, share: Share) -> Share:
        """Returns the part of every batch that lies in the shards of a rank."""
        return _StreamShare(rank=share.rank, ranks=share.ranks, together=share.together, stream=self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}  # a worker opens its own


@dataclass(frozen=True)
class _StreamShare(Share):
    """The records of a batch that lie in every `ranks`-th shard of a stream, from shard `rank` on."""

    stream: ShardedStream | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks > len(self.starts):
            raise ConfigurationError(
                f"{len(self.starts)} shards cannot be dealt to {self.ranks} ranks. Expected a shard for each rank at "
                "least. Cut the data into more shards, or train on fewer ranks."
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """Returns the sizes of the shards, which are the same on all ranks."""
        assert self.stream is not None
        return self.stream.sizes

    def of(self, examples: list[int]) -> list[int]:
        """Returns the places of this share of a batch."""
        if self.ranks == 1:
            return examples
        places = np.asarray(examples, dtype=np.int64)
        return places[self._ranks_of(examples) == self.rank].tolist()  # type: ignore[no-any-return]

    def largest(self, examples: list[int]) -> int:
        """Returns how many records the largest share of a batch has."""
        return int(np.bincount(self._ranks_of(examples), minlength=1).max())

    @property
    def readable(self) -> int:
        """Returns the place of the first record of the first shard of this rank."""
        return self.rank

    def _ranks_of(self, examples: list[int]) -> npt.NDArray[np.int64]:
        assert self.stream is not None
        return self.stream.shards_of(examples) % self.ranks


def is_stream(dataset: object) -> bool:
    """Returns whether a data set can only be iterated over."""
    return isinstance(dataset, IterableDataset) or (
        isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__")
    )


def in_order(dataset: Any, sampling: Sampling | None, *, workers: int, share: Share) -> Any:
    """Returns what a loader reads examples from: a stream as a data set that is read in order, any other as it is.

    Raises:
        ConfigurationError: if the sampling is none of a stream, or workers or ranks would each read all of it.
    """
    name = type(dataset).__name__
    if not isinstance(sampling, Stream):
        if isinstance(dataset, ShardedStream):
            raise ConfigurationError(
                f"a ShardedStream can be read in its order alone, and the sampling is {sampling}. Expected "
                "sampling=Stream(batch_size=..., records=len(data)). For sampling at random, give the shards random "
                "access: ShardedDataset."
            )
        return dataset
    if not is_stream(dataset):
        return dataset
    if workers > 1:
        raise ConfigurationError(
            f"num_workers={workers} with a stream of one part: each worker would read all of {name}, and a record "
            "could be in a batch of each. Expected at most one worker. Take num_workers=1, or cut the data into "
            "shards: ShardedStream, which any number of workers may read."
        )
    if share.ranks > 1:
        raise ConfigurationError(
            f"{share.ranks} ranks with a stream of one part: each rank would read all of {name}, and nobody knows "
            "that they read the same. Expected shards, of which each rank reads its own: ShardedStream."
        )
    return RecordsInOrder(dataset, sampling.records)
