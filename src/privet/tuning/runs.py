"""How often a mechanism runs before the best result is chosen: laws of a number that has to stay secret.

Papernot and Steinke, arXiv 2110.03620: with a fixed number of runs the cost would grow with it, with a random one it
hardly does. Numbers are drawn by inversion of a uniform number of 53 bits, so that each probability is off by at most
2^-53.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from privet.accounting import Event, NegativeBinomialSelectionEvent, NoEvent, PoissonSelectionEvent

__all__ = ["NegativeBinomialRuns", "PoissonRuns", "Runs", "Uniform"]

_WIDEST = 100.0  # a Poisson number of a larger mean is drawn as a sum, so that no probability underflows


class Uniform(Protocol):
    """A source of uniform numbers."""

    def random(self) -> float:
        """Returns a number in [0, 1)."""


class Runs(Protocol):
    """The law of the number of runs."""

    def event(self, run: Event) -> Event:
        """Returns the event of choosing the best of so many runs of `run`."""

    def draw(self, source: Uniform) -> int:
        """Returns a number of runs."""


@dataclass(frozen=True)
class PoissonRuns:
    """A Poisson number of runs. There may be none, with probability e^-mean."""

    mean: float

    def __post_init__(self) -> None:
        self.event(NoEvent())  # checks the number

    def event(self, run: Event) -> Event:
        """Returns the event of choosing the best of so many runs of `run`."""
        return PoissonSelectionEvent(self.mean, run)

    def draw(self, source: Uniform) -> int:
        """Returns a number of runs."""
        pieces = math.ceil(self.mean / _WIDEST)
        mean = self.mean / pieces

        def law() -> Iterator[float]:
            chance, k = math.exp(-mean), 0
            while True:
                yield chance
                k += 1
                chance *= mean / k

        return sum(_inverted(law(), source.random(), mean) for _ in range(pieces))


@dataclass(frozen=True)
class NegativeBinomialRuns:
    """A truncated negative binomial number of runs, 1 or more: `shape` η > -1 and `success` γ in (0, 1).

    With a shape of 1 it is geometric with mean 1 / γ. Smaller shapes cost less privacy for one mean, and have more runs
    now and then.
    """

    shape: float
    success: float

    def __post_init__(self) -> None:
        self.event(NoEvent())  # checks the numbers

    def event(self, run: Event) -> Event:
        """Returns the event of choosing the best of so many runs of `run`."""
        return NegativeBinomialSelectionEvent(self.shape, self.success, run)

    def draw(self, source: Uniform) -> int:
        """Returns a number of runs."""
        mean = NegativeBinomialSelectionEvent(self.shape, self.success, NoEvent()).mean_runs

        def law() -> Iterator[float]:
            exponent = -self.shape * math.log(self.success)
            first = self.shape / math.expm1(exponent) if exponent != 0.0 else 1.0 / -math.log(self.success)
            chance, k = (1.0 - self.success) * first, 1
            while True:
                yield chance
                chance *= (1.0 - self.success) * (k + self.shape) / (k + 1)
                k += 1

        return 1 + _inverted(law(), source.random(), mean)


def _inverted(law: Iterator[float], uniform: float, mean: float) -> int:
    """Returns the place in the law at which its sum passes `uniform`, or at which nothing is left that could add up."""
    total = 0.0
    for place, chance in enumerate(law):
        total += chance
        if total > uniform or (place > mean and chance < 1e-20):
            return place
    raise AssertionError("a law has no end")
