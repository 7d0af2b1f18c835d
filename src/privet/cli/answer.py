"""Answers as tables for people, rounded to the safe side, and as JSON for programs, in full precision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from privet.accounting import Certificate
from privet.accounting.decimals import rounded_text

__all__ = ["Down", "Up", "certified", "print_json", "show", "show_curve"]


@dataclass(frozen=True)
class Up:
    """A bound that is never too small: a table shows it rounded up."""

    value: float


@dataclass(frozen=True)
class Down:
    """A bound that is never too large: a table shows it rounded down."""

    value: float


def certified(name: str, found: Certificate, *, none_outside: str) -> dict[str, object]:
    """Returns the rows of a certificate; `none_outside` is the note where the search met its limit."""
    shown: object = Up(found.value) if name == "noise_multiplier" else Down(found.value)
    outside = None if found.epsilon_outside is None else Up(found.epsilon_outside)
    return {
        name: found.value if isinstance(found.value, int) else shown,
        "epsilon": Up(found.epsilon),
        "outside": found.outside,
        "epsilon_outside": outside,
        "target_epsilon": found.target_epsilon,
        "delta": found.delta,
        "relation": found.relation.value,
        "group_size": found.group_size,
        "accountant": found.accountant,
        "notes": [none_outside] if found.outside is None else [],
    }


def show(values: Mapping[str, object], *, as_json: bool, title: str) -> None:
    """Prints an answer: one JSON object, or a table without the rows that say nothing."""
    if as_json:
        print_json(values)
        return
    table = Table(title=title, show_header=False)
    for name, value in values.items():
        if value not in (None, []):
            table.add_row(name.replace("_", " "), _text(value))
    Console().print(table)


def show_curve(
    deltas: Sequence[float], curves: Mapping[str, Sequence[float]], values: Mapping[str, object], *, as_json: bool
) -> None:
    """Prints ε at each δ for each accountant, and the `values` that say whose it is."""
    if as_json:
        print_json({**values, "delta": list(deltas), "epsilon": curves})
        return
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    table = Table("δ", *(f"ε ({name})" for name in curves), title=f"ε(δ), {said}")
    for place, delta in enumerate(deltas):
        table.add_row(_text(delta), *(_text(Up(values[place])) for values in curves.values()))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, Up | Down):
        return rounded_text(value.value, up=isinstance(value, Up))
    if isinstance(value, list | tuple):
        return "; ".join(_text(each) for each in value)
    return str(value)


def print_json(values: Mapping[str, object]) -> None:
    """Prints one JSON object. JSON has no infinity: it becomes the text "inf", which every reader notices."""
    print(json.dumps(_plain(values), ensure_ascii=False, allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, Up | Down):
        return _plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
