"""A partition: a pass is cut into batches that share no example, as a sequential or shuffled loader cuts it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from privet._checks import check_count
from privet.accounting.correlated import CorrelatedEvent, CorrelatedRelease
from privet.accounting.event import Event, PartitionEvent, repeated
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.draw import address, shuffled_indices

__all__ = ["Partition", "with_batch_size"]


@dataclass(frozen=True)
class Partition(Sampling):
    """The batches of a pass share no example: a sequential or shuffled loader. Order hides nothing: not amplified.

    Attributes:
        shuffled: whether each pass has an order of its own, drawn from the key.
        batch_size: the number of examples in a batch. It may be left out where a loader says it.
        drop_last: whether a last batch that is smaller than the others is left out.
        dataset_size: the number of examples, where it has to be known before a dataset is: correlated noise costs what
            the number of batches between two participations of an example says.

    Example:
        >>> Partition(shuffled=True, batch_size=32).steps_per_pass(size=100)
        4
    """

    shuffled: bool = False
    batch_size: int | None = None
    drop_last: bool = False
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "dataset_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_count(name, getattr(self, name), 1))

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "pass"."""
        return "pass"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` passes begun, in each of which an example meets the base event at most once.

        Raises:
            ConfigurationError: if the noise is correlated, and two participations of an example may be close to each
                other, or it is not known how far apart they are.
        """
        if isinstance(base_event, CorrelatedRelease):
            return repeated(CorrelatedEvent(1, self._separation(), base_event), count)
        return repeated(PartitionEvent(1, base_event), count)

    def shared(self, words: Keystream, *, size: int, number: int) -> list[int] | None:
        """Returns the order of the pass, or None if it is that of the dataset."""
        if not self.shuffled:
            return None
        drawn = shuffled_indices(words, size=size, step=address(number, 0), name="shuffle")
        return drawn.tolist()  # type: ignore[no-any-return]

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: list[int] | None) -> list[int]:
        """Returns the examples of one batch: the next ones in the order of the pass."""
        batch_size = self._batch_size()
        start = index * batch_size
        stop = min(start + batch_size, size)
        return list(range(start, stop)) if shared is None else shared[start:stop]

    def steps_per_pass(self, size: int) -> int:
        """Returns the number of batches that the examples fill, the last one maybe in part."""
        if self.dataset_size not in {None, size}:
            raise ConfigurationError(
                f"{self} is for {self.dataset_size} examples, and there are {size}: an example would take part again "
                "after another number of steps than is billed. Expected the number of examples of the dataset."
            )
        batch_size = self._batch_size()
        steps = size // batch_size if self.drop_last else -(-size // batch_size)
        if steps == 0:
            raise ConfigurationError(
                f"drop_last=True leaves no batch of {batch_size} from {size} examples: choose a smaller batch size."
            )
        return steps

    def expected_batch_size(self, size: int) -> float:
        """Returns the batch size."""
        return self._batch_size()

    @property
    def random_size(self) -> bool:
        """Returns False."""
        return False

    @property
    def resumable(self) -> bool:
        """Returns whether the order is fixed: under a fresh key, examples of a shuffled pass could come again."""
        return not self.shuffled

    def _separation(self) -> int:
        """Returns how many steps lie between two participations of an example."""
        if self.shuffled:
            raise ConfigurationError(
                "the noise is correlated over steps, and in a partition that is shuffled anew an example may take part "
                "in the last batch of one pass and in the first of the next. Expected a fixed order, in which a pass "
                "lies between. Shuffle the records once beforehand, and give Partition(shuffled=False, ...)."
            )
        if self.dataset_size is None:
            raise ConfigurationError(
                f"the noise is correlated over steps, and {self} does not say after how many of them an example takes "
                "part again. Expected the number of examples: Partition(batch_size=..., dataset_size=n)."
            )
        return self.steps_per_pass(self.dataset_size)

    def _batch_size(self) -> int:
        if self.batch_size is None:
            raise ConfigurationError(
                "A partition is described by its batch_size, and its steps follow: give it, as in "
                "Partition(batch_size=32)."
            )
        return self.batch_size


def with_batch_size(sampling: Sampling, expected: float | None) -> Sampling:
    """Returns a partition that does not say its batch size with the expected one; any other sampling as it is."""
    if expected is None or not isinstance(sampling, Partition) or sampling.batch_size is not None:
        return sampling
    return replace(sampling, batch_size=max(1, round(expected)))
