"""A record in memory that follows the rows of a ledger's file, at a cost that does not grow with the file.

Every change of the file has a number, and every row the number of the change that wrote it last: what others wrote is
read by itself. The head of the file has a digest of all rows. Where it does not fit what was read so, the file was put
back from a copy or changed by hand, and it is read as a whole.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from privet._checks import check_count
from privet.accounting.event import Event
from privet.accounting.phases import Phase
from privet.accounting.record import Record
from privet.errors import ConfigurationError, LedgerError

__all__ = ["Head", "Mirror"]

_VERSION = 2
_MODULUS = 2**256
_PUT_BACK = "the ledger file was put back from an earlier copy; steps of runs that had ended may be missing from it"


class Head(NamedTuple):
    """How many changes the file has seen, and the digest of all its rows."""

    changes: int
    digest: int


class Mirror:
    """Reads and writes the rows of a ledger's file, inside of transactions that others open.

    Attributes:
        record: the file as it was when it was last read or written.

    Args:
        path: for messages.
        relation: what the file must be under.
        unit: what the file must be about.
    """

    def __init__(self, path: Path, relation: str, unit: str) -> None:
        self.record = Record()
        self._path = path
        self._relation = relation
        self._unit = unit
        self._seen = Head(-1, 0)

    def added(self, more: Mapping[str, Iterable[Phase]], marks: Iterable[str], head: Head) -> None:
        """Takes over into the record what `write` has written, once it is certain to stay."""
        for run, phases in more.items():
            for phase in phases:
                self.record.add(run, phase)
        self.record.marks |= dict.fromkeys(marks)
        self._seen = head

    def fill(self, connection: sqlite3.Connection) -> None:
        """Writes the head of a new file."""
        digest = _digest("head", _VERSION, self._relation, self._unit)
        row = (_VERSION, self._relation, self._unit, 0, f"{digest:064x}")
        connection.execute("INSERT INTO head VALUES (?, ?, ?, ?, ?)", row)

    def refresh(self, connection: sqlite3.Connection) -> list[Phase]:
        """Brings the record up to the file, and the file up to the record where it was put back.

        Returns:
            What the record did not hold before.

        Raises:
            LedgerError: if the file is damaged, or of another relation or unit.
        """
        heads = connection.execute("SELECT version, relation, unit, changes, digest FROM head").fetchall()
        expected = (_VERSION, self._relation, self._unit)
        if len(heads) != 1 or heads[0][:3] != expected:
            raise LedgerError(f"{self._path} has the head {heads}; expected one of {expected}. Open it as what it is.")
        try:
            head = Head(int(heads[0][3]), int(heads[0][4], 16))
        except (TypeError, ValueError) as error:
            raise LedgerError(f"{self._path} is damaged: its head is {heads[0]} ({error}).") from error
        if head == self._seen:
            return []
        if head.changes > self._seen.changes >= 0:
            new = self._read_changes(connection, head)
            if new is not None:
                return new
        return self._read_all(connection, head)

    def _read_changes(self, connection: sqlite3.Connection, head: Head) -> list[Phase] | None:
        """Takes over what other runs wrote since, and returns it; None if the digest says that more has changed."""
        digest, since = self._seen.digest, (self._seen.changes,)
        query = "SELECT run, place, event, count FROM phase WHERE changed > ? ORDER BY id"
        more: list[tuple[str, Phase]] = []
        for run, place, text, count in connection.execute(query, since):
            known = self.record.runs.get(run, [])
            before = known[place] if place < len(known) else None
            if before is not None:
                digest -= _digest("phase", run, place, _text(before.event), before.count)
            digest += _digest("phase", run, place, text, count)
            phase = _phase(text, count)
            if before is None:
                more.append((run, phase))
            elif before.event != phase.event or before.count > phase.count:
                return None
            elif before.count < phase.count:
                more.append((run, Phase(phase.event, phase.count - before.count)))
        marks = [text for (text,) in connection.execute("SELECT text FROM mark WHERE changed > ?", since)]
        digest += sum(_digest("mark", text) for text in marks)
        if digest % _MODULUS != head.digest:
            return None
        for run, phase in more:
            self.record.add(run, phase)
        self.record.marks |= dict.fromkeys(marks)
        self._seen = head
        return [phase for _, phase in more]

    def _read_all(self, connection: sqlite3.Connection, head: Head) -> list[Phase]:
        """Reads and checks the whole file, writes back to it what it lacks, and returns what the record lacked."""
        found, digest = Record(), _digest("head", _VERSION, self._relation, self._unit)
        for run, place, text, count in connection.execute("SELECT run, place, event, count FROM phase ORDER BY id"):
            digest += _digest("phase", run, place, text, count)
            if place != len(found.runs.get(run, ())):
                raise LedgerError(f"{self._path} is damaged: run {run} lacks a row before number {place}.")
            found.add(run, _phase(text, count))
        for (text,) in connection.execute("SELECT text FROM mark"):
            digest += _digest("mark", text)
            found.marks[text] = None
        if digest % _MODULUS != head.digest:
            raise LedgerError(
                f"{self._path} is damaged or was changed by hand: the digest of its rows is {digest % _MODULUS:064x}, "
                f"and {head.digest:064x} is on record. Put a copy back; a run that is still on writes again what it "
                "knows of."
            )
        missing = self.record.beyond(found)
        marks = [text for text in self.record.marks if text not in found.marks]
        new = found.beyond(self.record)
        self.record, self._seen = found, head
        if missing or marks:
            marks.append(_PUT_BACK)
            self.added(missing, marks, self.write(connection, missing, marks))
        return [phase for phases in new.values() for phase in phases]

    def write(self, connection: sqlite3.Connection, more: dict[str, list[Phase]], marks: Iterable[str]) -> Head:
        """Writes phases at the ends of runs, and marks, to the file alone; returns the head that it has then."""
        changes, digest = self._seen.changes + 1, self._seen.digest
        for run, phases in more.items():
            known = self.record.runs.get(run, [])
            place, last = len(known) - 1, known[-1] if known else None
            for phase in phases:
                if last is not None and last.event == phase.event:
                    text = self._row_text(connection, run, place, last)
                    digest -= _digest("phase", run, place, text, last.count)
                    last = Phase(last.event, last.count + phase.count)
                    change = "UPDATE phase SET count = ?, changed = ? WHERE run = ? AND place = ?"
                    connection.execute(change, (last.count, changes, run, place))
                else:
                    place, last, text = place + 1, phase, _text(phase.event)
                    row = (run, place, text, last.count, changes)
                    connection.execute("INSERT INTO phase VALUES (NULL, ?, ?, ?, ?, ?)", row)
                digest += _digest("phase", run, place, text, last.count)
        for text in marks:
            added = connection.execute("INSERT OR IGNORE INTO mark VALUES (?, ?)", (text, changes)).rowcount
            digest += _digest("mark", text) if added else 0
        head = Head(changes, digest % _MODULUS)
        if head.digest == self._seen.digest:
            return self._seen
        connection.execute("UPDATE head SET changes = ?, digest = ?", (head.changes, f"{head.digest:064x}"))
        return head

    def _row_text(self, connection: sqlite3.Connection, run: str, place: int, known: Phase) -> str:
        """Returns the text of a row's event, after checking that the row is as it was written."""
        query = "SELECT event, count FROM phase WHERE run = ? AND place = ?"
        text, count = connection.execute(query, (run, place)).fetchone() or ("", 0)
        if count != known.count or _event(text) != known.event:
            raise LedgerError(
                f"{self._path} was changed by hand: row {place} of run {run} has {count} of {text!r}, and {known} was "
                "written. Put a copy back."
            )
        assert isinstance(text, str)
        return text


def _digest(*values: object) -> int:
    """Returns the digest of one row. Digests of rows add up, so that one change costs the same in a file of any size.

    Bellare and Micciancio, EUROCRYPT 1997: AdHash. Without a key it shows accidents and edits by hand, not forgers.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(values).encode()).digest(), "big")


@lru_cache(maxsize=4096)
def _text(event: Event) -> str:
    try:
        return json.dumps(event.to_dict(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{event} cannot be kept in a file: {error}. Give it fields that JSON has.") from error


@lru_cache(maxsize=4096)
def _event(text: str) -> Event:
    try:
        return Event.from_dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise LedgerError(f"The ledger file has a row that describes no event: {text!r} ({error}).") from error


def _phase(text: str, count: object) -> Phase:
    try:
        return Phase(_event(text), check_count("count", count, 1))
    except ConfigurationError as error:
        raise LedgerError(f"The ledger file has a damaged row: {error}") from error
