"""Numbers of few decimal digits, rounded to a chosen side: what is printed, and what calibration chooses from."""

from __future__ import annotations

import math
from decimal import Decimal

from privet._checks import check_at_least

__all__ = ["SHOWN_DIGITS", "beside", "nearest", "rounded_text"]

SHOWN_DIGITS = 6  # how many significant digits people are shown


def nearest(value: float, digits: int) -> float:
    """Returns the number of `digits` significant digits that is nearest to `value`."""
    return float(f"{value:.{digits - 1}e}")


def beside(value: float, digits: int, *, up: bool) -> float:
    """Returns the next number of `digits` significant digits above, or below, a `value` above 0 that is one of them."""
    shown = Decimal(f"{value:.{digits - 1}e}")
    power = Decimal(1).scaleb(shown.adjusted())
    unit = power.scaleb(1 - digits)
    if up:
        return float(shown + unit)
    return float(shown - (unit if shown > power else unit / 10))  # below a power of ten they lie ten times closer


def rounded_text(value: float, *, up: bool, digits: int = SHOWN_DIGITS) -> str:
    """Returns the text of a number of at least 0 in `digits` significant digits, rounded up, or down.

    What `float` reads from the text is never below `value` where `up`, and never above it otherwise. A number that has
    no more digits than that is shown as it is.

        >>> rounded_text(6.1885533, up=True), rounded_text(6.1885533, up=False), rounded_text(0.1, up=True)
        ('6.18856', '6.18855', '0.1')

    Raises:
        ConfigurationError: if `value` is negative or not a number.
    """
    if value == math.inf:
        return "inf"
    value = check_at_least("value", value) + 0.0  # no minus before a zero
    shown = nearest(value, digits)
    if (shown < value) if up else (shown > value):
        shown = beside(shown, digits, up=up)
    return f"{shown:.{digits}g}"
