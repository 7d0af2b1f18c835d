"""Truncated Poisson sampling: Poisson batches of at most a public number of examples, for memory that is fixed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from privet._checks import check_at_least, check_count, check_positive, check_probability
from privet.accounting.event import Event, TruncatedPoissonEvent, repeated
from privet.errors import ConfigurationError
from privet.noise.keystream import Keystream
from privet.sampling.base import Sampling
from privet.sampling.draw import address, chosen_indices, poisson_indices
from privet.sampling.poisson import Poisson

__all__ = ["TruncatedPoisson"]


@dataclass(frozen=True)
class TruncatedPoisson(Sampling):
    """Poisson sampling at `rate`; of a batch with more than `cap` examples, a uniformly random choice of `cap` is kept.

    No batch is larger than `cap`. The accounting sees the cap: at six deviations above the mean it costs nothing that
    can be measured, at three it may double ε. Chua et al., arXiv 2411.04205; Ganesh et al., 2508.15089.

    Attributes:
        rate: the probability with which an example is drawn.
        cap: the most examples in a batch, a public number.
        dataset_size: the number of examples, which is public here; under add-or-remove-one that of the larger data set.

    Example:
        >>> TruncatedPoisson.of(batch_size=500, dataset_size=50_000)
        TruncatedPoisson(rate=0.01, cap=634, dataset_size=50000)
    """

    rate: float
    cap: int
    dataset_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_probability("rate", self.rate))
        object.__setattr__(self, "cap", check_count("cap", self.cap, 1))
        object.__setattr__(self, "dataset_size", check_count("dataset_size", self.dataset_size, 1))

    @classmethod
    def of(cls, batch_size: int, dataset_size: int, *, deviations: float = 6.0) -> TruncatedPoisson:
        """Returns the sampling of a mean batch size, with a cap so many deviations above it."""
        rate = Poisson.of(batch_size, dataset_size).rate
        spread = math.sqrt(batch_size * (1.0 - rate))
        return cls(rate, math.ceil(batch_size + check_at_least("deviations", deviations) * spread), dataset_size)

    @property
    def billed_per(self) -> Literal["step", "pass"]:
        """Returns "step"."""
        return "step"

    def event_for(self, base_event: Event, count: int = 1) -> Event:
        """Returns `count` steps of the base event under truncated Poisson sampling."""
        return repeated(TruncatedPoissonEvent(self.rate, self.cap, self.dataset_size, base_event), count)

    def shared(self, words: Keystream, *, size: int, number: int) -> None:
        """Returns None: every batch is drawn by itself."""

    def draw(self, words: Keystream, *, size: int, number: int, index: int, shared: object) -> list[int]:
        """Returns the examples of one batch."""
        self._check_size(size)
        step = address(number, index)
        drawn = poisson_indices(words, rate=self.rate, size=size, step=step, name="poisson")
        if len(drawn) > self.cap:
            drawn = drawn[chosen_indices(words, count=self.cap, size=len(drawn), step=step, name="truncation")]
        return drawn.tolist()  # type: ignore[no-any-return]

    def steps_per_pass(self, size: int) -> int:
        """Returns the steps of an epoch of Poisson sampling at this rate."""
        self._check_size(size)
        return Poisson(self.rate).steps_per_epoch

    def expected_batch_size(self, size: int) -> float:
        """Returns rate x size, the mean before anything is cut."""
        return self.rate * size

    @property
    def random_size(self) -> bool:
        """Returns True."""
        return True

    @property
    def resumable(self) -> bool:
        """Returns True: batches are independent, so that a pass may go on with batches drawn afresh."""
        return True

    def scaled(self, factor: float) -> TruncatedPoisson:
        """Returns the sampling at `factor` times the rate, with the same cap."""
        check_positive("the factor on the sampling rate", factor)
        return replace(self, rate=self.rate * factor)

    def _check_size(self, size: int) -> None:
        if size not in {self.dataset_size, self.dataset_size - 1}:
            raise ConfigurationError(
                f"{self} is for {self.dataset_size} examples, and the data set has {size}. Expected as many, or one "
                "less: how often a batch is cut depends on it, and so does ε. Give the size of this data set."
            )
