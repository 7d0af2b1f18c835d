"""How a batch is formed: frozen descriptions, and the accounting event that each one earns.

A description holds public numbers only. `event_for` is the bill: Poisson sampling amplifies privacy at every step; a
fixed partition does not, and bounds how often an example takes part instead, once per pass begun.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol

from privet._checks import check_probability
from privet.accounting.event import Event, PartitionEvent, PoissonEvent, repeated
from privet.errors import ConfigurationError

__all__ = ["BatchTicket", "Partition", "Poisson", "Sampling"]


class Sampling(Protocol):
    """A way of forming batches."""

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns what is billed: every step taken, or every pass over the data begun."""

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns the event of `count` steps (or passes begun), each step of which is `base_event` without sampling."""


@dataclass(frozen=True)
class Poisson:
    """Every example joins every batch independently with probability `rate`: batches of random size, maybe empty."""

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

    @property
    def steps_per_epoch(self) -> int:
        """Returns ceil(1 / rate): the steps in which an example is expected once or a little more."""
        if self.rate == 0.0:
            raise ConfigurationError("A sampling rate of 0 has no epochs: give the number of steps.")
        # Of the rate that was meant: 49 steps at 1 / 49, not the 50 that its nearest float, a little below, would give.
        meant = Fraction(self.rate).limit_denominator(1 << 32)
        return math.ceil(1 / (meant or Fraction(self.rate)))

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` steps of the base event under Poisson sampling."""
        return repeated(PoissonEvent(self.rate, base_event), count)


@dataclass(frozen=True)
class Partition:
    """The batches of a pass share no example: a sequential or shuffled loader. Order hides nothing: not amplified."""

    shuffled: bool = False

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "pass"."""
        return "pass"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` passes begun, in each of which an example meets the base event at most once."""
        return repeated(PartitionEvent(1, base_event), count)


@dataclass(frozen=True)
class BatchTicket:
    """Where a batch came from. The loader announces it just before it hands the batch over."""

    step: int  # logical batches handed over before this one, over the loader's whole life
    index: int  # its place in the pass
    passes: int  # passes begun, this one included: the epoch, counted from 1; a new number is a pass to be billed
    size: int  # SECRET under Poisson sampling: the realised number of examples; never a divisor
    last: bool = True  # whether it ends its logical batch; False for all but the last of several physical ones
    first: bool = True  # whether it begins its logical batch
    sampling: Poisson | Partition | None = None  # the law that it was drawn under, if that may differ from today's
