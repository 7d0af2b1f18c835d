"""Cyclic Poisson sampling: the data are cut into parts once, and the steps draw from one part after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from privet._checks import check_count, check_probability
from privet.accounting.correlated import in_one_participation
from privet.accounting.event import Event, PartitionEvent, PoissonEvent, repeated
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.draw import MOST_STEPS, Places, address, poisson_indices, random_places

__all__ = ["CyclicPoisson"]


@dataclass(frozen=True)
class CyclicPoisson(Sampling):
    """Step i draws a Poisson batch at `rate` from part i of `parts`; after the last part, a new pass begins.

    Each example is dealt to a part at random, by itself and whatever it holds, once for the life of a loader. So two of
    its participations are `parts` steps apart at least, which noise that is correlated over so many steps needs
    (Choquette-Choo et al., arXiv 2306.08153). A pass costs one Poisson step at `rate`. For independent noise, plain
    Poisson sampling at rate / parts has batches of the same size and a smaller ε.

    Attributes:
        rate: the probability with which an example of the part joins its batch.
        parts: the number of parts, and of the steps in a pass.

    Example:
        >>> CyclicPoisson(rate=0.1, parts=4).expected_batch_size(1000)
        25.0
    """

    rate: float
    parts: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_probability("rate", self.rate))
        object.__setattr__(self, "parts", check_count("parts", self.parts, 1))
        if self.parts > MOST_STEPS:
            raise ConfigurationError(f"a pass has at most 2**32 batches, got parts = {self.parts}: take fewer.")

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "pass"."""
        return "pass"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` passes, in each of which an example may be drawn in one step, at `rate`.

        Raises:
            ConfigurationError: if the noise is correlated over more than `parts` steps.
        """
        participation = in_one_participation(base_event, self.parts)
        return repeated(PartitionEvent(1, PoissonEvent(self.rate, participation)), count)

    def shared(self, words: Keystream, *, size: int, number: int) -> Places:
        """Returns in which part each example is: the same in all passes under one key."""
        # No pass has the number 0.
        return random_places(words, places=self.parts, size=size, step=address(0, 0), name="parts")

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: Places) -> list[int]:
        """Returns the examples of one batch."""
        part = shared.of(index)
        step = address(number, index)
        return part[poisson_indices(words, rate=self.rate, size=len(part), step=step, name="cyclic")].tolist()  # type: ignore[no-any-return]

    def steps_per_pass(self, size: int) -> int:
        """Returns the number of parts."""
        return self.parts

    def expected_batch_size(self, size: int) -> float:
        """Returns rate x size / parts."""
        return self.rate * size / self.parts

    @property
    def random_size(self) -> bool:
        """Returns True."""
        return True

    @property
    def resumable(self) -> bool:
        """Returns False: under a fresh key the parts are others, and an example could be drawn again."""
        return False

    def scaled(self, factor: float) -> CyclicPoisson:
        """Raises ConfigurationError: a pass keeps its rate."""
        raise ConfigurationError(
            f"{self} is billed by the pass, and its rate is not scheduled. Expected Poisson sampling. Leave the rate "
            "alone, or sample with Poisson."
        )
