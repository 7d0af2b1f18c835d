"""Batches of a fixed size, each drawn afresh without replacement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privet._checks import check_count
from privet.accounting.event import Event, FixedSizeEvent, repeated
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.draw import address, chosen_indices

__all__ = ["FixedSize"]


@dataclass(frozen=True)
class FixedSize(Sampling):
    """Every batch is a uniformly random choice of exactly `batch_size` of `dataset_size` examples.

    Another example is in a record's place where the record is not drawn. So this costs far more than Poisson sampling
    at the same rate (Lebeda et al., arXiv 2405.20769), and suits neighbors of one size: replace-one and zero-out. With
    `dataset_size=` at the paper's door, which hides the size, it is refused.

    Attributes:
        batch_size: the number of examples in a batch.
        dataset_size: the number of examples, which is public here.

    Example:
        >>> FixedSize(batch_size=32, dataset_size=100).steps_per_pass(size=100)
        4
    """

    batch_size: int
    dataset_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", check_count("batch_size", self.batch_size, 1))
        object.__setattr__(self, "dataset_size", check_count("dataset_size", self.dataset_size, 1))
        if self.batch_size > self.dataset_size:
            raise ConfigurationError(
                f"batch_size must be at most dataset_size = {self.dataset_size}, got {self.batch_size}: choose a "
                "smaller batch."
            )

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "step"."""
        return "step"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` steps of the base event on batches of this size."""
        return repeated(FixedSizeEvent(self.batch_size, self.dataset_size, base_event), count)

    def shared(self, words: Keystream, *, size: int, number: int) -> None:
        """Returns None: every batch is drawn by itself."""

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: object) -> list[int]:
        """Returns the examples of one batch."""
        self._check_size(size)
        step = address(number, index)
        return chosen_indices(words, count=self.batch_size, size=size, step=step, name="fixed size").tolist()  # type: ignore[no-any-return]

    def steps_per_pass(self, size: int) -> int:
        """Returns the steps in which an example is expected once or a little more."""
        self._check_size(size)
        return -(-size // self.batch_size)

    def expected_batch_size(self, size: int) -> float:
        """Returns the batch size."""
        return self.batch_size

    @property
    def random_size(self) -> bool:
        """Returns False."""
        return False

    @property
    def resumable(self) -> bool:
        """Returns True: batches are independent, so that a pass may go on with batches drawn afresh."""
        return True

    def _check_size(self, size: int) -> None:
        if size != self.dataset_size:
            raise ConfigurationError(
                f"{self} is for {self.dataset_size} examples, and the data set has {size}. Expected as many: the rate "
                "is the ratio of the two sizes. Give the size of this data set."
            )
