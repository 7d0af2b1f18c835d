"""Small line plots as SVG, written by hand: no library, no script, and the colors of the page around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

__all__ = ["Curve", "Plot"]

_WIDTH, _HEIGHT = 420.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 24.0, 14.0, 46.0
_MOST_TICKS = 6


@dataclass(frozen=True)
class Curve:
    """Points in order of x, joined by lines, or by `steps` where a value holds until the next point."""

    points: tuple[tuple[float, float], ...]
    label: str = ""
    steps: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture of curves, and the words that stand for it where there are no pictures.

    Attributes:
        caption: one sentence: what is shown, and what to see in it.
        log_x, log_y: whether that axis is logarithmic; its values are then above 0.
        floor_y: whether the y axis starts at 0.
    """

    caption: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    log_y: bool = False
    floor_y: bool = True

    def to_svg(self) -> str:
        """Returns the picture as an element to stand inside of an HTML page."""
        xs = [x for curve in self.curves for x, _ in curve.points]
        ys = [y for curve in self.curves for _, y in curve.points]
        across = _Axis.over(xs, log=self.log_x, floor=False, start=_LEFT, end=_WIDTH - _RIGHT)
        up = _Axis.over(ys, log=self.log_y, floor=self.floor_y, start=_HEIGHT - _BOTTOM, end=_TOP)
        parts = [f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(self.caption)}">']
        parts += [_vertical(across.place(each), text) for each, text in across.ticks()]
        parts += [_horizontal(up.place(each), text) for each, text in up.ticks()]
        parts += [_line(curve, across.place, up.place, index) for index, curve in enumerate(self.curves)]
        middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2.0, (_TOP + _HEIGHT - _BOTTOM) / 2.0
        parts.append(_text(middle_x, _HEIGHT - 8.0, self.x_label, "middle"))
        turned = f' transform="rotate(-90 14 {middle_y:g})"'
        parts.append(_text(14.0, middle_y, self.y_label, "middle", turned))
        parts += self._legend()
        return "".join([*parts, "</svg>"])

    def _legend(self) -> list[str]:
        found: list[str] = []
        for index, curve in enumerate(self.curves):
            if curve.label:
                y = _TOP + 14.0 + 16.0 * len(found)
                kind = "faint" if curve.faint else f"line{index % 3}"
                mark = f'<path class="{kind}" d="M{_LEFT + 10:g} {y - 4:g}h18"/>'
                found.append(mark + _text(_LEFT + 34.0, y, curve.label, "start"))
        return found


@dataclass(frozen=True)
class _Axis:
    """From values to places on the picture, linear or logarithmic."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @staticmethod
    def over(values: list[float], *, log: bool, floor: bool, start: float, end: float) -> _Axis:
        """Returns the axis that holds all values, with some room where they are all the same."""
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        elif floor:
            low = min(0.0, low)
        if high <= low:
            room = abs(high) * 0.1 or 1.0
            low, high = (low, high + room) if floor and not log else (low - room, high + room)
        return _Axis(low, high, log, start, end)

    def place(self, value: float) -> float:
        """Returns where a value lies."""
        position = math.log10(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns values to mark, with their texts."""
        if self.log:
            first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
            every = max(1, -(-(last - first) // _MOST_TICKS))
            found = [(10.0**power, f"1e{power}" if power else "1") for power in range(first, last + 1, every)]
            return found or [(10.0**self.low, f"{10.0**self.low:.3g}")]
        span = (self.high - self.low) / (_MOST_TICKS - 1)
        unit = 10.0 ** math.floor(math.log10(span))
        step = next(unit * each for each in (1.0, 2.0, 5.0, 10.0) if unit * each >= span * 0.999)
        count = range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        return [(index * step, f"{index * step:.6g}") for index in count]


def _line(curve: Curve, across: Callable[[float], float], up: Callable[[float], float], index: int) -> str:
    pieces = []
    for place, (x, y) in enumerate(curve.points):
        if place == 0:
            pieces.append(f"M{across(x):.1f} {up(y):.1f}")
        elif curve.steps:
            pieces.append(f"H{across(x):.1f}V{up(y):.1f}")
        else:
            pieces.append(f"L{across(x):.1f} {up(y):.1f}")
    return f'<path class="{"faint" if curve.faint else f"line{index % 3}"}" d="{"".join(pieces)}"/>'


def _vertical(x: float, text: str) -> str:
    grid = f'<path class="grid" d="M{x:.1f} {_TOP:g}V{_HEIGHT - _BOTTOM:g}"/>'
    return grid + _text(x, _HEIGHT - _BOTTOM + 16.0, text, "middle")


def _horizontal(y: float, text: str) -> str:
    grid = f'<path class="grid" d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}"/>'
    return grid + _text(_LEFT - 6.0, y + 4.0, text, "end")


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
