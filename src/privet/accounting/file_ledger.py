"""A ledger in a file, shared by several runs on the same data."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import final

from privet._checks import check_count
from privet.accounting.accountant import Accountant
from privet.accounting.budget import Budget
from privet.accounting.event import Event, Relation, Unit
from privet.accounting.ledger import AbstractLedger
from privet.accounting.mirror import Head, Mirror
from privet.accounting.phases import Phase
from privet.accounting.record import LOCK, Record, check_mark
from privet.accounting.sqlite_file import LedgerFile
from privet.errors import BudgetExceededError

__all__ = ["FileLedger"]


@final
class FileLedger(AbstractLedger):
    """The record of every run that shares `path`, with the meaning of `Ledger`, over all runs together.

    Guarantees: never under-counts, under concurrent writers and a kill at any moment. `begin` returns once the step is
    on the disk. A file that is damaged, foreign or gone is refused, and never repaired. A file that an earlier copy
    was put in the place of gets back what this object knows of, with a mark that says so. Rows that were changed
    without their digest are refused; a forger who computes the digest anew is not noticed.

    Args:
        path: the file, made if it does not exist. Links and a later `chdir` do not matter.
        relation: the neighboring relation; must be the file's where it exists.
        unit: the unit of privacy; must be the file's where it exists.
        accountant: what `epsilon` and the budget use.
        budget: the most that all runs together may spend.
        run: words that the ids of this ledger's runs begin with.
        block: how many steps to put on record at once. More than 1 saves writes; what a run that ends early has not
            used of its last block stays billed.

    Raises:
        LedgerError: if there is a file and it is not a sound ledger of this relation and unit.

    Example:
        >>> import tempfile
        >>> from privet.accounting import FileLedger, GaussianEvent, PoissonEvent, Relation
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ledger = FileLedger(f"{folder}/census.ledger", relation=Relation.ZERO_OUT)
        ...     ledger.begin(PoissonEvent(0.01, GaussianEvent(1.0)))
        ...     FileLedger(f"{folder}/census.ledger", relation=Relation.ZERO_OUT).steps
        1
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        unit: Unit = Unit.EXAMPLE,
        accountant: str | Accountant = "pld",
        budget: Budget | None = None,
        run: str | None = None,
        block: int = 1,
    ) -> None:
        super().__init__(relation=relation, unit=unit, accountant=accountant, budget=budget, label=run)
        self.block = check_count("block", block, 1)
        self._reserved: dict[tuple[str, Event], int] = {}
        resolved = Path(path).resolve()
        self._mirror = Mirror(resolved, self.relation.value, self.unit.value)
        self._file = LedgerFile(resolved, self._mirror.fill)
        with LOCK:
            self._file.transact(self._refresh)

    @property
    def path(self) -> Path:
        """The file itself, with all links resolved."""
        return self._file.path

    def _current(self) -> Record:
        self._file.transact(self._refresh)
        return self._mirror.record

    def mark(self, text: str) -> None:
        """Adds a remark to the file, once."""
        other = Record()
        other.marks[check_mark(text)] = None
        self._join(other)

    def begin(self, event: Event, count: int = 1) -> None:
        """Records in the file that `count` steps or passes of `event` begin. Call it before their noise is drawn.

        Raises:
            BudgetExceededError: if they would exceed the budget; nothing is begun then.
            LedgerError: if the file is not sound any more, or gone; nothing is begun then.
        """
        asked = Phase(event, check_count("count", count, 1))
        with LOCK:
            # A copy of this ledger and a forked child have ids of their own, and so none of what this one reserved.
            run = self._run.value
            reserved = self._reserved.get((run, event), 0)
            if reserved < count:
                reserved += self._put(run, asked)
            self._reserved[run, event] = reserved - count

    def _put(self, run: str, asked: Phase) -> int:
        """Puts a phase on record, a whole block if there is room, and returns how many steps it has."""

        def work(connection: sqlite3.Connection) -> tuple[Phase, Head]:
            self._refresh(connection)
            phase = self._affordable(asked)
            return phase, self._mirror.write(connection, {run: [phase]}, ())

        phase, head = self._file.transact(work)
        self._added({run: [phase]}, (), head)
        return phase.count

    def _affordable(self, asked: Phase) -> Phase:
        """Returns the steps to put on record: a whole block if the budget has room for it, else those asked for."""
        block = Phase(asked.event, max(asked.count, self.block))
        if self._meter is None:
            return block
        try:
            self._meter.admit(block.event, block.count, self._mirror.record.totals)
        except BudgetExceededError:
            if block == asked:
                raise
            self._meter.admit(asked.event, asked.count, self._mirror.record.totals)
            return asked
        return block

    def _join(self, other: Record) -> None:
        def work(connection: sqlite3.Connection) -> tuple[dict[str, list[Phase]], list[str], Head]:
            self._refresh(connection)
            more = other.beyond(self._mirror.record)
            marks = [text for text in other.marks if text not in self._mirror.record.marks]
            return more, marks, self._mirror.write(connection, more, marks)

        with LOCK:
            more, marks, head = self._file.transact(work)
            self._took_note(phase for phases in more.values() for phase in phases)
            self._added(more, marks, head)

    def _added(self, more: dict[str, list[Phase]], marks: Iterable[str], head: Head) -> None:
        """Takes over into memory what a transaction has written, now that it is on the disk."""
        self._mirror.added(more, marks, head)
        if self._file.replaced:  # in the middle of the transaction, which went to a file that has no name any more
            self._file.transact(self._refresh)

    def _refresh(self, connection: sqlite3.Connection) -> None:
        """Brings the record and the budget up to what other runs wrote to the file."""
        self._took_note(self._mirror.refresh(connection))

    def _took_note(self, phases: Iterable[Phase]) -> None:
        for phase in phases:
            if self._meter is not None:
                self._meter.began(phase.event, phase.count)
