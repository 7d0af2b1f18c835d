"""The record of what was begun, run by run: what ledgers, their states and their files have in common.

A run is what one ledger object begins in one process. It has an id that no other run has, and only that ledger writes
under it. So a record only grows, the longer of two records of one run holds the shorter one, and two ledgers are
joined by taking each run's longer record: nothing is lost, and nothing is counted twice.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from privet.accounting.event import Event
from privet.accounting.phases import Phase, append, phases_from, phases_to
from privet.errors import ConfigurationError, LedgerError

__all__ = ["LOCK", "Record", "RunId", "check_mark"]

LOCK = threading.RLock()
"""Held while a ledger changes. A fork waits for it, so that no child inherits half a change or an open file."""

_VERSION = 2
_KEYS = {"version", "relation", "unit", "marks", "runs"}
_KEYS_OF_VERSION_1 = {"version", "relation", "unit", "marks", "phases"}


class _Process:
    """Which process this is. A number would not do: process ids are used again."""

    token = object()


def _in_child() -> None:
    _Process.token = object()
    LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=_in_child)


class RunId:
    """The id of a run. A copy, an unpickled copy and a forked child each get an id of their own.

    Args:
        label: words that the id begins with, for people who read the record.
    """

    def __init__(self, label: str | None = None) -> None:
        self.label = label
        self.renew()

    def renew(self) -> None:
        """Goes on under a new id: what is begun from now on is another run."""
        unique = uuid.uuid4().hex
        self._value = unique if self.label is None else f"{self.label}-{unique}"
        self._token = _Process.token

    @property
    def value(self) -> str:
        """The id, which is a new one in a forked child."""
        if self._token is not _Process.token:
            self.renew()
        return self._value

    def __reduce__(self) -> tuple[type[RunId], tuple[str | None]]:
        return RunId, (self.label,)


class Record:
    """The phases of every run, with their sums.

    Attributes:
        runs: for each run its phases in order. Append with `add`, never by hand.
        marks: remarks that a reader of ε has to know, as the keys.
        totals: how often each event was begun, over all runs.
        steps: how many steps or passes were begun, over all runs.
    """

    def __init__(self) -> None:
        self.runs: dict[str, list[Phase]] = {}
        self.marks: dict[str, None] = {}
        self.totals: dict[Event, int] = {}
        self.steps = 0

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of one run after the other; equal neighbors are counted together."""
        found: list[Phase] = []
        for phases in self.runs.values():
            for phase in phases:
                append(found, phase)
        return tuple(found)

    def add(self, run: str, phase: Phase) -> None:
        """Adds a phase at the end of a run."""
        append(self.runs.setdefault(run, []), phase)
        self.totals[phase.event] = self.totals.get(phase.event, 0) + phase.count
        self.steps += phase.count

    def beyond(self, other: Record) -> dict[str, list[Phase]]:
        """Returns what this record holds and `other` lacks, by run.

        Raises:
            LedgerError: if the two disagree about a run, so that neither of its records continues the other.
        """
        found: dict[str, list[Phase]] = {}
        for run, phases in self.runs.items():
            theirs = other.runs.get(run, [])
            more = _rest(phases, theirs)
            if more is None and _rest(theirs, phases) is None:
                raise LedgerError(
                    f"Run {run} is on record in two ways, of which neither continues the other: {phases[-1]} here, "
                    f"{theirs[-1]} there, after {len(phases)} and {len(theirs)} phases. Expected one writer for each "
                    "run. One of the two is damaged, or a process was duplicated with its memory. Load one of them, "
                    "and begin() by hand what the other holds beyond it."
                )
            if more:
                found[run] = more
        return found

    def join(self, other: Record) -> list[Phase]:
        """Takes over what `other` holds and this record lacks, and returns it. A record is never shortened.

        Raises:
            LedgerError: if the two disagree about a run. Nothing is changed then.
        """
        more = other.beyond(self)
        for run, phases in more.items():
            for phase in phases:
                self.add(run, phase)
        self.marks |= other.marks
        return [phase for phases in more.values() for phase in phases]

    def state(self, relation: str, unit: str) -> dict[str, object]:
        """Returns the record as plain values for JSON."""
        return {
            "version": _VERSION,
            "relation": relation,
            "unit": unit,
            "marks": list(self.marks),
            "runs": {run: phases_to(phases) for run, phases in self.runs.items()},
        }

    @staticmethod
    def of_state(state: object, relation: str, unit: str) -> Record:
        """Returns the record that `state` described. A state of version 1 has no ids, and becomes a run of its own.

        Raises:
            LedgerError: if the state is damaged, or of another relation or unit.
        """
        values = _checked_state(state)
        if (values["relation"], values["unit"]) != (relation, unit):
            raise LedgerError(
                f"The saved ledger is under {values['relation']}, {values['unit']}; this one is under {relation}, "
                f"{unit}. Make the ledger with the saved relation and unit: no accountant converts them."
            )
        runs = {uuid.uuid4().hex: values["phases"]} if values["version"] == 1 else values["runs"]
        if not isinstance(runs, Mapping) or not all(isinstance(run, str) and run for run in runs):
            raise LedgerError(f"runs must map the id of each run to its phases, got {runs!r}.")
        record = Record()
        for run, phases in runs.items():
            for phase in phases_from(phases):
                record.add(run, phase)
        marks = values["marks"]
        if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
            raise LedgerError(f"marks must be a list of texts, got {marks!r}.")
        record.marks = dict.fromkeys(marks)
        return record


def check_mark(text: object) -> str:
    """Returns a remark if it is a text with something in it."""
    if not isinstance(text, str) or not text:
        raise ConfigurationError(f"A mark must be a non-empty text, got {text!r}.")
    return text


def _checked_state(state: object) -> Mapping[str, Any]:
    """Returns the state if its version and its keys are known."""
    version = state.get("version") if isinstance(state, Mapping) else None
    expected = _KEYS_OF_VERSION_1 if version == 1 else _KEYS
    if not isinstance(state, Mapping) or set(state) != expected:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise LedgerError(f"A ledger's state has the keys {sorted(expected)}, got {found}.")
    if isinstance(version, bool) or version not in (1, _VERSION):
        raise LedgerError(f"This version of privet reads ledgers of version 1 and {_VERSION}, got {version!r}.")
    return state


def _rest(longer: list[Phase], shorter: list[Phase]) -> list[Phase] | None:
    """Returns what `longer` has beyond `shorter`, or None where it does not continue it."""
    if not shorter:
        return list(longer)
    last = len(shorter) - 1
    if len(longer) <= last or longer[:last] != shorter[:last]:
        return None
    here, there = longer[last], shorter[last]
    if here.event != there.event or here.count < there.count:
        return None
    more = [Phase(here.event, here.count - there.count)] if here.count > there.count else []
    return more + longer[last + 1 :]
