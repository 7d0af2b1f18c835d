"""Checks of public numbers, with one wording for all errors: what was found, what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from privet.errors import ConfigurationError

__all__ = ["check_at_least", "check_choice", "check_count", "check_positive", "check_probability", "check_target_delta"]


def _number(name: str, value: object, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ConfigurationError(f"{name} must be {expected}, got {value!r}.")
    return float(value)


def check_probability(name: str, value: object) -> float:
    """Returns `value` as a float if it is a number in [0, 1]."""
    expected = "a number in [0, 1]"
    number = _number(name, value, expected)
    if not 0.0 <= number <= 1.0:
        raise ConfigurationError(f"{name} must be {expected}, got {value!r}.")
    return number


def check_target_delta(name: str, value: object, *, least: float | None = None) -> float:
    """Returns δ as a float if it is one that a target may have: above 0 (or `least` and above), below 1."""
    delta = check_probability(name, value)
    if delta == 0.0 and least is None:
        raise ConfigurationError(
            f"{name} is 0, and Gaussian noise has no finite ε there. Expected a number above 0, well below 1 over the "
            "number of examples. Give such as 1e-6."
        )
    if delta == 1.0:
        raise ConfigurationError(
            f"{name} is 1, which any mechanism meets, one that publishes the data too. Expected a number well below 1 "
            "over the number of examples. Give such as 1e-6."
        )
    return delta


def check_positive(name: str, value: object, *, finite: bool = True) -> float:
    """Returns `value` as a float if it is a number above 0, and below infinity where `finite`."""
    expected = "a finite number above 0" if finite else "a number above 0"
    number = _number(name, value, expected)
    if number <= 0.0 or (finite and math.isinf(number)):
        raise ConfigurationError(f"{name} must be {expected}, got {value!r}.")
    return number


def check_at_least(name: str, value: object, least: float = 0.0) -> float:
    """Returns `value` as a float if it is a finite number, `least` or more."""
    expected = f"a finite number of at least {least:g}"
    number = _number(name, value, expected)
    if number < least or math.isinf(number):
        raise ConfigurationError(f"{name} must be {expected}, got {value!r}.")
    return number


def check_count(name: str, value: object, least: int = 0) -> int:
    """Returns `value` as an int if it is a whole number, `least` or more."""
    if type(value) is int and value >= least:  # the common case, at every step
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return int(value)


def check_choice(
    name: str, value: object, choices: Sequence[str], *, elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raises if `value` is none of the choices, with a word on values that are known elsewhere."""
    if value not in choices:
        known = (elsewhere or {}).get(value) if isinstance(value, str) else None
        hint = "" if known is None else f" ({known})"
        raise ConfigurationError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}{hint}.")
