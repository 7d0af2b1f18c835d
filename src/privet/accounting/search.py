"""The search behind calibration: where a curve that falls toward privacy crosses a target, in few looks.

A look at the curve costs accountant calls, and is the only thing here that takes time. The number sought comes from a
ladder (decimals of few digits, or whole numbers), and the search ends when its two ends are close enough, or
neighbours. What is interpolated is held inside the limits of the ITP method (Oliveira and Takahashi, ACM Trans. Math.
Softw. 47, 2020), so that a rough curve never costs more than a few looks above those of bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from privet.accounting.decimals import beside, nearest

__all__ = ["Bracket", "Curve", "Ladder", "Look", "enclosed", "narrowed"]

_SPARE_LOOKS = 2  # above the looks of bisection, in the worst case
_FARTHEST = math.log(1e3)  # between two looks while the crossing is not yet enclosed
_JUMP = (0.01, 4.0)  # a curve that falls so far in height within so small a width is not chased any further
_OVERSHOOT = 1.1  # of a step that means to land just beyond the crossing


@dataclass(frozen=True)
class Look:
    """One look at the curve: ε at a value, whether it fits the target, and the height above it, a logarithm."""

    value: float
    epsilon: float
    fits: bool
    height: float


@dataclass(frozen=True)
class Bracket:
    """The private end and the other end of the crossing; `None` where a limit was reached without finding one."""

    good: Look | None
    bad: Look | None


class Curve(Protocol):
    """What is searched."""

    def look(self, value: float) -> Look:
        """Returns what the accountant says at a value; the height is finite wherever one can be had."""


@dataclass(frozen=True)
class Ladder:
    """The values that may be tried: those between two limits, both included, with `digits` digits, or whole numbers.

    The *place* of a value is its logarithm, with the sign that makes it grow toward privacy.
    """

    least: float
    greatest: float
    private_above: bool
    digits: int | None = None  # None: whole numbers

    def place(self, value: float) -> float:
        """Returns the place of a value."""
        return math.log(value) if self.private_above else -math.log(value)

    def at(self, place: float) -> float:
        """Returns the rung nearest to a place, within the limits."""
        log = place if self.private_above else -place
        value = math.exp(min(max(log, math.log(self.least)), math.log(self.greatest)))
        rung = float(round(value)) if self.digits is None else nearest(value, self.digits)
        return min(max(rung, self.least), self.greatest)

    def between(self, good: float, bad: float, place: float) -> float | None:
        """Returns the rung nearest to a place of those strictly between two rungs; `None` if there is none."""
        low, high = min(good, bad), max(good, bad)
        lowest, highest = self.beside(low, up=True), self.beside(high, up=False)
        return None if lowest >= high else min(max(self.at(place), lowest), highest)

    def at_limit(self, look: Look) -> bool:
        """Whether nothing lies beyond a look, in the direction in which the crossing must be."""
        return look.value == (self.least if look.fits == self.private_above else self.greatest)

    def beside(self, value: float, *, up: bool) -> float:
        """Returns the next rung above a rung, or below it."""
        if self.digits is None:
            return value + (1.0 if up else -1.0)
        return beside(value, self.digits, up=up)


def enclosed(curve: Curve, ladder: Ladder, start: float, *, slope: float = 1.0) -> Bracket:
    """Returns a bracket around the crossing, or one end where the limits hold none. `slope` is how steep the curve is.

    Every step means to land just beyond the crossing. Its length comes from the height and the slope, and doubles where
    the height did not halve, and after the third step in any case.
    """
    found = curve.look(ladder.at(ladder.place(start)))
    previous: Look | None = None
    moved, taken = 0.0, 0
    while not ladder.at_limit(found):
        length = max(0.7, 2.0 * moved)
        if math.isfinite(found.height):
            if previous is not None and math.isfinite(previous.height):
                slope = abs((previous.height - found.height) / moved)
            length = _OVERSHOOT * abs(found.height) / min(max(slope, 1e-3), 1e3) + 2e-4
            if previous is not None and (taken > 3 or abs(found.height) > 0.5 * abs(previous.height)):
                length = max(length, 2.0 * moved)
        place = ladder.place(found.value)
        length = min(length, _FARTHEST)
        value = ladder.at(place - length if found.fits else place + length)
        if value == found.value:  # the rungs lie further apart than the step is long
            value = ladder.beside(value, up=found.fits != ladder.private_above)
        previous, found, taken = found, curve.look(value), taken + 1
        moved = abs(ladder.place(found.value) - place)
        if previous.fits != found.fits:
            return Bracket(found, previous) if found.fits else Bracket(previous, found)
    return Bracket(found, None) if found.fits else Bracket(None, found)


def narrowed(curve: Curve, ladder: Ladder, good: Look, bad: Look, tolerance: float) -> tuple[Look, Look]:
    """Returns the bracket narrowed until its ends differ by at most `tolerance`, relative, or are neighbours.

    Among decimals it ends at a hundredth where the curve jumps: nothing there is worth a closer look.

    Looks are taken a little beside the place where the crossing seems to be, on the side of the farther end, so that
    both ends close in.
    """
    third: Look | None = None
    allowed = math.ceil(math.log2(max(_width(ladder, good, bad) / tolerance, 1.0))) + _SPARE_LOOKS
    while _width(ladder, good, bad) > tolerance and not _jumps(ladder, good, bad):
        high, low = ladder.place(good.value), ladder.place(bad.value)
        middle = (high + low) / 2.0
        root = _root(ladder, [good, bad, *([third] if third else [])])
        wanted = middle if root is None else root + math.copysign(tolerance / 2.0, high + low - 2.0 * root)
        # The ITP method's projection: as far from the middle as still lets bisection end in time.
        reach = max(tolerance / 2.0 * 2.0**allowed - (high - low) / 2.0, 0.0)
        wanted = min(max(wanted, middle - reach), middle + reach)
        allowed -= 1
        value = ladder.between(good.value, bad.value, wanted)
        if value is None:
            break
        found = curve.look(value)
        if found.fits:
            third, good = good, found
        else:
            third, bad = bad, found
    return good, bad


def _width(ladder: Ladder, good: Look, bad: Look) -> float:
    return abs(ladder.place(good.value) - ladder.place(bad.value))


def _jumps(ladder: Ladder, good: Look, bad: Look) -> bool:
    width, fall = _JUMP
    return ladder.digits is not None and _width(ladder, good, bad) <= width and bad.height - good.height >= fall


def _root(ladder: Ladder, looks: Sequence[Look]) -> float | None:
    """Returns where the height is 0 by inverse interpolation through two looks or three; `None` if that fails.

    The first two looks enclose the crossing.
    """
    points = [(ladder.place(look.value), look.height) for look in looks]
    (high, below), (low, above) = points[:2]
    if not (math.isfinite(below) and math.isfinite(above)) or above <= below:
        return None
    if len(points) == 3 and math.isfinite(points[2][1]):
        points.sort()
        heights = [height for _, height in points]
        if heights[0] > heights[1] > heights[2]:
            root = sum(
                place * math.prod(other / (other - height) for at, (_, other) in enumerate(points) if at != index)
                for index, (place, height) in enumerate(points)
            )
            if low < root < high:
                return root
    return low + (high - low) * above / (above - below)
