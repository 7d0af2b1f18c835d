"""Random allocation: in every pass each example is in one of the steps, chosen at random ("balls in bins")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privet._checks import check_count
from privet.accounting.event import Event, RandomAllocationEvent, repeated
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.draw import MOST_STEPS, Places, address, random_places

__all__ = ["RandomAllocation"]


@dataclass(frozen=True)
class RandomAllocation(Sampling):
    """Every example is in exactly one of the `steps` batches of a pass, each as likely, whatever the others are in.

    A pass reads every example once, as a shuffled loader does, and is amplified: it costs less than a pass of Poisson
    sampling at rate 1 / steps where the noise is small. Batches have random sizes, and one may be empty. A pass that is
    begun is billed as a whole. Feldman and Shenfeld, arXiv 2502.08202; Chua et al., arXiv 2412.16802.

    Attributes:
        steps: the number of batches in a pass, a public number.

    Example:
        >>> RandomAllocation(steps=100).expected_batch_size(25_600)
        256.0
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_count("steps", self.steps, 1))
        if self.steps > MOST_STEPS:
            raise ConfigurationError(f"a pass has at most 2**32 batches, got steps = {self.steps}: take fewer.")

    @classmethod
    def of(cls, batch_size: int, dataset_size: int) -> RandomAllocation:
        """Returns the sampling whose expected batch size is next to `batch_size`.

        Raises:
            ConfigurationError: if a batch would have more examples than there are.
        """
        check_count("batch_size", batch_size, 1)
        if batch_size > check_count("dataset_size", dataset_size, 1):
            raise ConfigurationError(
                f"batch_size = {batch_size} is more than the {dataset_size} examples. Expected at most as many. Choose "
                "a smaller batch."
            )
        return cls(steps=max(1, round(dataset_size / batch_size)))

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "pass"."""
        return "pass"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` passes of random allocation, each with choices of its own."""
        return repeated(RandomAllocationEvent(self.steps, base_event), count)

    def shared(self, words: Keystream, *, size: int, number: int) -> Places:
        """Returns in which step of the pass each example is."""
        return random_places(words, places=self.steps, size=size, step=address(number, 0), name="allocation")

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: Places) -> list[int]:
        """Returns the examples of one step."""
        return shared.of(index).tolist()  # type: ignore[no-any-return]

    def steps_per_pass(self, size: int) -> int:
        """Returns the steps of a pass, whatever the size."""
        return self.steps

    def expected_batch_size(self, size: int) -> float:
        """Returns size / steps."""
        return size / self.steps

    @property
    def random_size(self) -> bool:
        """Returns True."""
        return True

    @property
    def resumable(self) -> bool:
        """Returns False: under a fresh key, examples of the first part of a pass could come again."""
        return False

    def scaled(self, factor: float) -> RandomAllocation:
        """Raises ConfigurationError: a pass keeps its number of steps."""
        raise ConfigurationError(
            f"{self} has no rate to schedule: an example is once in a pass. Expected Poisson sampling. Leave the rate "
            "alone, or sample with Poisson."
        )
