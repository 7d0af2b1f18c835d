"""Courses: how a number changes over training, as a factor on its first value.

A course is a function of the schedule step t, with t = 0 before the first `schedule.step()`: the number at t is
`start × course(t)`. Any function of t alone is a course. The ones here are frozen and public descriptions of the usual
ones. A whole course is scaled by scaling its start, which is how it is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from privet._checks import check_count, check_positive
from privet.errors import ConfigurationError

__all__ = ["Course", "Exponential", "Listed", "Stepwise", "factor_at"]

Course = Callable[[int], float]
"""A function of the schedule step that returns the factor on the first value; the same on every call."""


@dataclass(frozen=True)
class Exponential:
    """`gamma ** t`.

    Example:
        >>> Exponential(0.5)(3)
        0.125
    """

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", check_positive("gamma", self.gamma))

    def __call__(self, t: int) -> float:
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

    def __call__(self, t: int) -> float:
        """Returns `gamma ** (t // step_size)`."""
        return self.gamma ** (t // self.step_size)


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

    def __call__(self, t: int) -> float:
        """Returns the factor of step t."""
        return self.factors[min(t, len(self.factors) - 1)]


def factor_at(course: Course, t: int, *, start: float, name: str) -> float:
    """Returns `course(t)`.

    Raises:
        ConfigurationError: if it, or `start` times it, is not a finite number above 0: negative, zero, nan or infinite.
    """
    try:
        given: object = course(t)
    except OverflowError:
        given = math.inf
    factor = check_positive(f"the factor on {name} at schedule step {t}", given)
    check_positive(f"{name} at schedule step {t}", start * factor)
    return factor
