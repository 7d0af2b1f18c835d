"""The table of attacks: how each is written down, run and judged.

An attack is a function. What becomes of it:

    stopped                 it raised an error of privet's, or the one that it says will stop it
    bounded                 it returned how far one example moved a sum, and that is at most 1.001 C
    billed                  it returned the ε that was billed, at least the honest one
    unseen and documented   it got through, and the pitfalls page has a row under "What privet cannot see" that says so
    BROKEN                  anything else, such as a sentence that says what got through
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from privet import PrivetError

__all__ = ["ATTACKS", "Attack", "Billed", "Outcome", "Result", "Unseen", "attack", "judged", "markdown"]

PITFALLS = Path(__file__).resolve().parent.parent / "docs" / "pitfalls.md"
BOUND = 1.001


@dataclass(frozen=True)
class Billed:
    """The ε that was billed, and the one that honesty asks for."""

    epsilon: float
    honest: float


@dataclass(frozen=True)
class Unseen:
    """An attack that gets through. `row` is how its row on the pitfalls page begins."""

    row: str
    figure: str


Outcome = float | Billed | Unseen | str


@dataclass(frozen=True)
class Attack:
    """One attack."""

    name: str
    kind: str
    run: Callable[[], Outcome]
    stopped_by: type[Exception] = PrivetError


@dataclass(frozen=True)
class Result:
    """What became of an attack."""

    attack: Attack
    verdict: str
    said: str
    seconds: float

    @property
    def broken(self) -> bool:
        """Returns whether the guarantee is broken."""
        return self.verdict == "BROKEN"


ATTACKS: list[Attack] = []


def attack(
    kind: str, name: str, *, stopped_by: type[Exception] = PrivetError
) -> Callable[[Callable[[], Outcome]], Callable[[], object]]:
    """Returns a decorator that adds a function to the table."""

    def add(run: Callable[[], Outcome]) -> Callable[[], object]:
        ATTACKS.append(Attack(name, kind, run, stopped_by))
        return run

    return add


def judged(each: Attack) -> Result:
    """Returns what becomes of an attack, by running it."""
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict, said = _verdict(each)
    return Result(each, verdict, said, time.perf_counter() - begun)


def _verdict(each: Attack) -> tuple[str, str]:
    try:
        outcome = each.run()
    except each.stopped_by as error:
        return "stopped", f"{type(error).__name__}: {_first_words(str(error))}"
    except Exception as error:  # noqa: BLE001 - an attack that fails by itself has shown nothing
        return "BROKEN", f"it failed: {type(error).__name__}: {_first_words(str(error))}"
    match outcome:
        case Billed(epsilon, honest):
            said = f"ε = {epsilon:.4g}, honest {honest:.4g}"
            return ("billed" if epsilon >= honest * (1 - 1e-6) else "BROKEN"), said
        case Unseen(row, figure):
            known = any(line.startswith(f"| {row}") for line in _unseen_rows())
            return ("unseen and documented", f"{figure}; pitfalls: {row}") if known else ("BROKEN", f"no row {row!r}")
        case str():
            return "BROKEN", outcome
        case _:
            return ("bounded" if outcome <= BOUND else "BROKEN"), f"moves the sum by {outcome:.3g} C"


def _unseen_rows() -> Sequence[str]:
    return PITFALLS.read_text(encoding="utf-8").split("## What privet cannot see")[1].splitlines()


def _first_words(text: str, most: int = 90) -> str:
    line = re.sub(r"\s+", " ", text).strip()
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"


def markdown(results: Sequence[Result], *, note: str) -> str:
    """Returns the table as a page."""
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in {r.verdict: None for r in results}}
    lines = [
        "# Attacks, and what becomes of them",
        "",
        "Made by `make attack`, which runs every program of this table and fails if one is BROKEN. The programs are in",
        "`attacks/`. Distances are of clipped sums with noise off, in units of the clip norm C: one example is left",
        "out, or replaced (then half the distance counts).",
        "",
        f"{note} {len(results)} attacks: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + ".",
        "",
        "| class | attack | what happens | what is said or measured |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.attack.kind} | {r.attack.name} | {r.verdict} | {r.said.replace('|', '/')} |" for r in results]
    return "\n".join(lines) + "\n"
