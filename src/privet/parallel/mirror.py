"""The ledger under ranks: rank 0 writes it, and every other rank keeps a mirror, so that ε is known everywhere.

    what happens                                  on the other ranks
    rank 0 wrote a step                           the mirror adds what was written, under the id of rank 0's run
    rank 0 was refused the step by its budget     the same error
    the ledger of rank 0 has more than that       the mirror is replaced by a copy of it (a file that other runs share)

Rank 0 writes before it joins the reduction of the sums. So no rank can hold the sum of all ranks before the step is on
record.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

from privet._checks import check_count
from privet.accounting.event import Event
from privet.accounting.ledger import AbstractLedger
from privet.accounting.phases import Phase
from privet.accounting.record import LOCK, Record, check_mark
from privet.accounting.role import LedgerLike
from privet.errors import BudgetExceededError, RanksError
from privet.parallel.agreement import Agreement

__all__ = ["Bookkeeping", "Mirror"]


@final
class Mirror(AbstractLedger):
    """What a rank other than 0 knows of the ledger of rank 0. It writes nothing anywhere, and refuses no step.

    Args:
        like: a ledger with the settings of rank 0's: relation, unit, accountant and budget.
    """

    def __init__(self, like: LedgerLike) -> None:
        super().__init__(relation=like.relation, unit=like.unit, accountant=like.accountant, budget=like.budget)
        self._record = Record()
        self._writer = self.run
        self._own: list[Phase] = []  # what was begun on this rank alone
        self.following = False  # while this rank goes over a step that rank 0 has written

    def follow(self, writer: str | None) -> None:
        """Adds steps to the run of this id from now on, which is the one that rank 0 writes under."""
        self._writer = self.run if writer is None else writer

    def replace(self, state: object) -> None:
        """Takes the saved state of rank 0's ledger in place of what is known."""
        record = Record.of_state(state, self.relation.value, self.unit.value)
        with LOCK:
            for phase in self._own:
                record.add(self.run, phase)
            self._record = record

    def _current(self) -> Record:
        return self._record

    def _join(self, other: Record) -> None:
        with LOCK:
            self._record.join(other)

    def mark(self, text: str) -> None:
        """Adds a remark, once."""
        with LOCK:
            self._record.marks[check_mark(text)] = None

    def begin(self, event: Event, count: int = 1) -> None:
        """Takes note of what this rank alone has begun, such as a step without privacy: no later step is taken then."""
        if not self.following:  # else rank 0 tells what it wrote
            phase = Phase(event, check_count("count", count, 1))
            with LOCK:
                self._own.append(phase)
                self._record.add(self.run, phase)

    def refuse_own(self) -> None:
        """Raises if this rank has begun something that rank 0 knows nothing of."""
        if self._own:
            raise RanksError(
                f"this rank alone has begun {', '.join(str(phase.event) for phase in self._own[:3])}, which is not on "
                "the ledger of rank 0. Expected every rank to do the same. Put it on the ledger of rank 0, and resume "
                "all ranks from a checkpoint."
            )

    def add(self, events: Sequence[Event], marks: Sequence[str]) -> None:
        """Takes note of what rank 0 has written."""
        with LOCK:
            for event in events:
                self._record.add(self._writer, Phase(event, 1))
            self._record.marks |= dict.fromkeys(marks)


class _Verdict(NamedTuple):
    """What became of a step on rank 0."""

    error: str | None
    over_budget: bool
    writer: str | None = None  # the id of the run that rank 0 writes under, if its ledger has ids
    events: tuple[Event, ...] = ()  # what was written
    marks: tuple[str, ...] = ()
    state: Any = None  # of the whole ledger, where that is not all


@final
class Bookkeeping:
    """Writes on rank 0, and follows on the others.

    Args:
        agreement: of the ranks.
    """

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._mirror: Mirror | None = None  # on the other ranks
        self._mirrored: int | None = None  # on rank 0: how many steps the mirrors know of

    def ledger(self, ledger: LedgerLike) -> LedgerLike:
        """Returns the ledger on rank 0, and on the others a mirror of it."""
        if self._agreement.rank == 0:
            self._mirrored = ledger.steps
            self._agreement.from_rank(0, (_writer(ledger), ledger.state_dict()))
            return ledger
        mirror = ledger if isinstance(ledger, Mirror) else Mirror(ledger)
        writer, state = self._agreement.from_rank(0, ("", None))
        mirror.replace(state)
        mirror.follow(writer)
        self._mirror = mirror
        return mirror

    def refuse_own(self) -> None:
        """Raises if this rank has begun something that rank 0 knows nothing of."""
        if self._mirror is not None:
            self._mirror.refuse_own()

    def written(self, write: Callable[[], Sequence[Event]], ledger: LedgerLike) -> None:
        """Calls `write` on rank 0, and elsewhere once rank 0 has told what it wrote.

        Raises:
            BudgetExceededError: on all ranks, if the step would exceed the budget of rank 0's ledger.
            RanksError: on other ranks, if rank 0 could not write. On rank 0 its own error is raised.
        """
        if self._agreement.rank == 0:
            self._write(write, ledger)
            return
        assert isinstance(ledger, Mirror)
        verdict = self._agreement.from_rank(0, _Verdict(None, over_budget=False))
        ledger.follow(verdict.writer)
        if verdict.state is None:
            ledger.add(verdict.events, verdict.marks)
        else:
            ledger.replace(verdict.state)
        if verdict.error is None:
            with warnings.catch_warnings():  # rank 0 has warned
                warnings.simplefilter("ignore")
                ledger.following = True
                try:
                    write()  # for the books of batches that each rank keeps
                finally:
                    ledger.following = False
        if verdict.over_budget:
            raise BudgetExceededError(f"rank 0 refused the step: {verdict.error}")
        if verdict.error is not None:
            raise RanksError(
                f"rank 0 could not write the step to its ledger, so that no rank may take it. It raised {verdict.error}"
            )

    def _write(self, write: Callable[[], Sequence[Event]], ledger: LedgerLike) -> None:
        """Writes, and tells the other ranks what became of it."""
        error: Exception | None = None
        events: Sequence[Event] = ()
        try:
            events = write()
        except Exception as failure:  # noqa: BLE001 - it is raised below, once the others have heard of it
            error = failure
        # A step that was written in part is not all that there is, nor is one beside those of other runs in one file.
        steps, state = ledger.steps, None
        if error is not None or self._mirrored is None or steps != self._mirrored + len(events):
            state = ledger.state_dict()
        self._mirrored = steps
        said = None if error is None else f"{type(error).__name__}: {error}"
        over = isinstance(error, BudgetExceededError)
        self._agreement.from_rank(
            0, _Verdict(said, over, _writer(ledger), events=tuple(events), marks=ledger.marks, state=state)
        )
        if error is not None:
            raise error


def _writer(ledger: LedgerLike) -> str | None:
    """Returns the id of the run that a ledger writes under, if it has one."""
    run = getattr(ledger, "run", None)
    return run if isinstance(run, str) else None
