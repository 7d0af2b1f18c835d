"""A stream: records that come one after the other in a fixed order, and that are read a declared number of times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privet._checks import check_count
from privet.accounting.event import Event
from privet.errors import ConfigurationError, ProtocolError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.partition import Partition

__all__ = ["Stream"]


@dataclass(frozen=True)
class Stream(Sampling):
    """A pass cuts `records` records into batches in the order in which they come. Nothing is amplified by the order.

    A record is in exactly one batch of a pass, so that a pass costs one participation, whatever the number of batches.
    This is what a `Partition` in a fixed order costs; correlated noise makes the best of it. Unlike a partition, a
    stream need not have a length or random access, and says how often it may be read: a further pass is refused.

    Attributes:
        batch_size: the number of records in a batch. The last batch of a pass may be smaller.
        records: the number of records in a pass, a public number. A stream that ends before or after it is refused.
        passes: how many passes may begin.

    Example:
        >>> Stream(batch_size=32, records=100).steps_per_pass(100)
        4
    """

    batch_size: int
    records: int
    passes: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "records", "passes"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), 1))

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "pass"."""
        return "pass"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` passes, in each of which a record meets the base event exactly once.

        Raises:
            ConfigurationError: if these are more passes than may begin.
        """
        if count > self.passes:
            raise ConfigurationError(
                f"{count} passes are planned over {self}. Expected at most {self.passes}, since each pass that is read "
                f"is another participation of every record. Declare them: Stream(..., passes={count})."
            )
        return self._order.event_for(base_event, count)

    def refuse_pass(self, number: int) -> None:
        """Raises ProtocolError if pass `number`, counted from 1, is more than was declared."""
        if number > self.passes:
            raise ProtocolError(
                f"pass {number} over a stream would begin, and {self} declares {self.passes}. Expected no further one: "
                "each record would take part once more. Nothing was released. Declare as many passes as are trained "
                "on, Stream(..., passes=...), before the run."
            )

    def shared(self, words: Keystream, *, size: int, number: int) -> None:
        """Returns None: the order is that of the stream."""

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: None) -> list[int]:
        """Returns the places of the records of one batch."""
        start = index * self.batch_size
        return list(range(start, min(start + self.batch_size, size)))

    def steps_per_pass(self, size: int) -> int:
        """Returns the number of batches of a pass."""
        return self._order.steps_per_pass(size)

    def expected_batch_size(self, size: int) -> float:
        """Returns the batch size."""
        return self.batch_size

    @property
    def random_size(self) -> bool:
        """Returns False."""
        return False

    @property
    def resumable(self) -> bool:
        """Returns True: the order is fixed, so that no record of the first part of a pass comes again."""
        return True

    @property
    def _order(self) -> Partition:
        return Partition(batch_size=self.batch_size, dataset_size=self.records)
