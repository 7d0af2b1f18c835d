"""The role of a sampling: how a batch is formed, and the accounting event that this earns.

A sampling of your own is one class in one file (docs/extending/sampler.md). Nothing outside of this package asks which
class a sampling has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from privet.accounting.event import Event
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.recognition import Leaves

__all__ = ["BatchTicket", "Planned", "Sampling", "SpentOnce", "refuse_change"]


class Sampling(ABC):
    """A way of forming batches: a frozen description that holds public numbers only.

    Guarantees expected of an implementation: `draw` forms batches by the law that `event_for` is the bill of. It takes
    all of its randomness from the words that it is given.
    """

    # -- what is billed ----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns what is billed: every step that is taken, or every pass over the data that is begun."""

    @abstractmethod
    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns the event of `count` steps (or passes begun), each step of which is `base_event` without sampling."""

    # -- which examples are drawn ------------------------------------------------------------------------------------

    @abstractmethod
    def shared(self, words: Keystream, *, size: int, number: int) -> object:
        """Returns what all batches of pass `number` have in common, such as its order, or None.

        It is computed once a pass, and handed to `draw`.
        """

    @abstractmethod
    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: Any) -> list[int]:
        """Returns the examples of batch `index` of pass `number`, as indices from 0 to `size` - 1.

        They must be a function of the arguments alone, so that prefetching changes nothing. No other batch uses the
        step `address(number, index)` of the words (`privet.sampling.draw`).
        """

    @abstractmethod
    def steps_per_pass(self, size: int) -> int:
        """Returns the number of batches in a pass over `size` examples."""

    @abstractmethod
    def expected_batch_size(self, size: int) -> float:
        """Returns the expected number of examples in a batch drawn from `size`, which is what a sum is divided by."""

    # -- what a loader has to know of it -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def random_size(self) -> bool:
        """Returns whether the size of a batch is random, so that a batch may be empty and its size is secret."""

    @property
    @abstractmethod
    def resumable(self) -> bool:
        """Returns whether a pass may go on under a fresh key: no example of its first part may come again for it."""

    def scaled(self, factor: float) -> Sampling:
        """Returns the same sampling with `factor` times the expected batch size, for a schedule.

        Raises:
            ConfigurationError: if there is no such sampling, which is so unless a sampling says otherwise.
        """
        raise ConfigurationError(
            f"{self} has no rate to schedule. Expected Poisson sampling. Leave the rate of another sampling alone."
        )


@runtime_checkable
class Planned(Protocol):
    """A sampling that says how many passes may begin."""

    def refuse_pass(self, number: int) -> None:
        """Raises ProtocolError if pass `number`, counted from 1, is more than was planned."""


@runtime_checkable
class SpentOnce(Protocol):
    """A sampling whose draws were made before the run, so that each may be trained on once, by whatever run."""

    def position(self, steps: int) -> tuple[int, int]:
        """Returns the passes that were begun, and the batches spent of the last: 0 if it is done.

        Args:
            steps: the batches of a pass of the loader.
        """

    def spend(self, number: int, index: int, *, record: bool) -> None:
        """Marks batch `index` of pass `number` as spent. Call it before the batch is handed over.

        Args:
            number: of the pass, from 1.
            index: of the batch in the pass.
            record: whether it is marked for good, which one of several ranks does.

        Raises:
            ProtocolError: if it, or one after it, is spent already.
        """


def refuse_change(now: Sampling, then: Sampling) -> None:
    """Raises ConfigurationError unless one sampling may take another's place in mid-run: only the rate may differ."""
    if type(now) is not type(then) or not now.random_size or now.billed_per != "step":
        raise ConfigurationError(
            f"{now} cannot become {then} in mid-run: only a rate may change, of batches that are each drawn by "
            "themselves. Expected Poisson sampling, before and after."
        )


@dataclass(frozen=True)
class BatchTicket:
    """Where a batch came from. The loader announces it just before it hands the batch over."""

    step: int  # logical batches handed over before this one, over the loader's whole life
    index: int  # its place in the pass
    passes: int  # passes begun, this one included: the epoch, counted from 1
    size: int  # SECRET under Poisson sampling: the realised number of examples; never a divisor
    last: bool = True  # whether it ends its logical batch; False for all but the last of several physical ones
    first: bool = True  # whether it begins its logical batch
    parts: int = 1  # how many physical ones its logical batch always has, where that was declared (accumulate=)
    sampling: Sampling | None = None  # the law that it was drawn under, if that may differ from today's
    digest: int = 0  # of the whole logical batch, by which ranks see that they share one
    source: int = field(
        default=0, compare=False
    )  # which loader it is of; a loader that was set back has another number than before
    ends_pass: bool = field(default=False, compare=False)  # whether no logical batch of its pass comes after it
    owner: npt.NDArray[np.int64] | None = field(
        default=None, compare=False, repr=False
    )  # SECRET (size,), ascending: which of its users each record belongs to, where a user is the unit of privacy
    leaves: Leaves | None = field(default=None, compare=False, repr=False)  # by which its tensors are recognized

    @property
    def whole(self) -> bool:
        """Returns whether it is of a logical batch in one piece."""
        return self.first and self.last

    @property
    def pass_key(self) -> tuple[int, int]:
        """Returns what tells its pass from every other pass of every loader: each is billed by itself."""
        return self.source, self.passes

    def of_same_batch(self, other: BatchTicket) -> bool:
        """Returns whether both are of one logical batch."""
        return self.pass_key == other.pass_key and self.index == other.index
