"""Poisson sampling: every example joins every batch by a coin of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from privet._checks import check_positive, check_probability
from privet.accounting.event import Event, PoissonEvent, repeated
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.draw import address, poisson_indices

__all__ = ["Poisson"]


@dataclass(frozen=True)
class Poisson(Sampling):
    """Every example joins every batch independently with probability `rate`: batches of random size, maybe empty.

    Example:
        >>> Poisson(rate=0.01).steps_per_epoch
        100
    """

    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_probability("rate", self.rate))

    @classmethod
    def of(cls, batch_size: int, dataset_size: int) -> Poisson:
        """Returns the sampling whose expected batch size is `batch_size`: the rate is never rounded to some 1/k."""
        if batch_size > dataset_size:
            raise ConfigurationError(
                f"A batch of {batch_size} from {dataset_size} examples needs a sampling rate above 1: "
                f"choose a batch size of at most {dataset_size}."
            )
        return cls(rate=batch_size / dataset_size)

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "step"."""
        return "step"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` steps of the base event under Poisson sampling."""
        return repeated(PoissonEvent(self.rate, base_event), count)

    def shared(self, words: Keystream, *, size: int, number: int) -> None:
        """Returns None: every batch is drawn by itself."""

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: object) -> list[int]:
        """Returns the examples of one batch."""
        drawn = poisson_indices(words, rate=self.rate, size=size, step=address(number, index), name="poisson")
        return drawn.tolist()  # type: ignore[no-any-return]

    @property
    def steps_per_epoch(self) -> int:
        """Returns ceil(1 / rate): the steps in which an example is expected once or a little more."""
        if self.rate == 0.0:
            raise ConfigurationError("A sampling rate of 0 has no epochs: give the number of steps.")
        # Of the rate that was meant: 49 steps at 1 / 49, not the 50 that its nearest float, a little below, would give.
        meant = Fraction(self.rate).limit_denominator(1 << 32)
        return math.ceil(1 / (meant or Fraction(self.rate)))

    def steps_per_pass(self, size: int) -> int:
        """Returns the steps of an epoch, whatever the size."""
        return self.steps_per_epoch

    def expected_batch_size(self, size: int) -> float:
        """Returns rate x size."""
        return self.rate * size

    @property
    def random_size(self) -> bool:
        """Returns True."""
        return True

    @property
    def resumable(self) -> bool:
        """Returns True: batches are independent, so that a pass may go on with batches drawn afresh."""
        return True

    def scaled(self, factor: float) -> Poisson:
        """Returns the sampling at `factor` times the rate."""
        check_positive("the factor on the sampling rate", factor)
        return Poisson(check_positive("the sampling rate", self.rate * factor))
