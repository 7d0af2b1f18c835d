"""Courses: how a number changes over training, as a factor on where it starts. Frozen and public descriptions.

The number at schedule step t is `start × factor(t)`, with t = 0 before the first `schedule.step()`. So a whole course
is scaled by scaling its start, which is how it is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from privet._checks import check_count, check_positive
from privet.errors import ConfigurationError

__all__ = ["Course", "Exponential", "Lambda", "Listed", "Stepwise", "value_at"]


@runtime_checkable
class Course(Protocol):
    """How a number changes over training."""

    def factor(self, t: int) -> float:
        """Returns the number at schedule step t over the number at the start."""


@dataclass(frozen=True)
class Exponential:
    """`gamma ** t`."""

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", check_positive("gamma", self.gamma))

    def factor(self, t: int) -> float:
        """Returns `gamma ** t`."""
        return self.gamma**t


@dataclass(frozen=True)
class Stepwise:
    """`gamma ** (t // step_size)`: constant for `step_size` steps at a time."""

    step_size: int
    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_size", check_count("step_size", self.step_size, 1))
        object.__setattr__(self, "gamma", check_positive("gamma", self.gamma))

    def factor(self, t: int) -> float:
        """Returns `gamma ** (t // step_size)`."""
        return self.gamma ** (t // self.step_size)


@dataclass(frozen=True)
class Lambda:
    """Whatever a function of t says. It must be a function of t alone, the same on every call."""

    function: Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigurationError(f"a Lambda course needs a function of the step, got {self.function!r}.")

    def factor(self, t: int) -> float:
        """Returns `function(t)`."""
        return self.function(t)


@dataclass(frozen=True)
class Listed:
    """One factor for each step; the last one holds from then on."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        given: object = self.factors
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ConfigurationError(f"factors must be a sequence of numbers above 0, got {given!r}.")
        factors = tuple(check_positive(f"factor {place}", factor) for place, factor in enumerate(given))
        if not factors:
            raise ConfigurationError("factors is empty. Expected a factor for each step.")
        object.__setattr__(self, "factors", factors)

    def factor(self, t: int) -> float:
        """Returns the factor of step t."""
        return self.factors[min(t, len(self.factors) - 1)]


def value_at(course: Course, t: int, *, start: float, name: str) -> float:
    """Returns `start × factor(t)`.

    Raises:
        ConfigurationError: if that is not a finite number above 0: negative, zero, nan or infinite.
    """
    try:
        factor: object = course.factor(t)
    except OverflowError:
        factor = math.inf
    value = start * check_positive(f"the factor on {name} at schedule step {t}", factor)
    return check_positive(f"{name} at schedule step {t}", value)
