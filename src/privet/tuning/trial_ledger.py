"""The ledger of one trial: it lets through what one run was declared to be, and nothing more.

What the trials spend is on record before the first of them begins, as one selection. So a trial's ledger has nothing to
bill; it makes sure that the bill was large enough.
"""

from __future__ import annotations

from typing import final

from privet._checks import check_count
from privet.accounting import (
    AbstractLedger,
    ComposedEvent,
    Event,
    LedgerLike,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    Phase,
    SelfComposedEvent,
)
from privet.accounting.dominance import dominates
from privet.accounting.record import LOCK, Record, check_mark
from privet.errors import BudgetExceededError, LedgerError

__all__ = ["TrialLedger"]


@final
class TrialLedger(AbstractLedger):
    """A ledger that holds the steps of one trial, and refuses steps that the run does not have.

    Guarantees: what was begun is always a part of the declared run, with steps that are at least as private in the
    place of its own: more noise, or a smaller rate. Marks go to the parent too, whose ε they are about.

    Args:
        run: the event of one whole run.
        parent: the ledger that the selection is billed to.
    """

    def __init__(self, run: Event, parent: LedgerLike) -> None:
        super().__init__(relation=parent.relation, unit=parent.unit, accountant=parent.accountant)
        self._run_event = run
        self._parent = parent
        self._left = _steps(run, 1)
        self._record = Record()

    def _current(self) -> Record:
        return self._record

    def _join(self, other: Record) -> None:
        raise LedgerError(
            "The ledger of a trial takes no steps from another ledger: a trial starts anew, and all of it was "
            "declared. Load no checkpoint of a ledger inside of a trial."
        )

    def mark(self, text: str) -> None:
        """Adds a remark, once, here and to the ledger that the selection is billed to."""
        with LOCK:
            self._record.marks[check_mark(text)] = None
        self._parent.mark(text)

    def begin(self, event: Event, count: int = 1) -> None:
        """Takes `count` steps of `event` from what is left of the declared run.

        A release without protection has happened already when it is put on record: it goes to the parent, whose ε is
        then infinite.

        Raises:
            BudgetExceededError: if that is not enough. Nothing is begun then.
        """
        if isinstance(event, NonPrivateEvent):
            budget, self._parent.budget = self._parent.budget, None
            try:
                self._parent.begin(event, count)
            finally:
                self._parent.budget = budget
            with LOCK:
                self._record.add(self._run.value, Phase(event, count))
            return
        wanted = _steps(event, check_count("count", count, 1))
        with LOCK:
            left = dict(self._left)
            for each, times in wanted.items():
                if not _take(left, each, times):
                    rest = {one: number for one, number in self._left.items() if number}
                    raise BudgetExceededError(
                        f"{times} of {each} are not left of the run that was declared, {self._run_event}. Left are "
                        f"{rest}. Nothing was begun. Declare a run that holds all steps of a trial, each with at most "
                        "its noise and at least its rate."
                    )
            self._left = left
            self._record.add(self._run.value, Phase(event, count))


def _steps(event: Event, count: int) -> dict[Event, int]:
    """Returns the single steps and passes of an event, with how often each is in it."""
    found: dict[Event, int] = {}
    waiting = [(event, count)]
    while waiting:
        each, times = waiting.pop()
        if isinstance(each, SelfComposedEvent):
            waiting.append((each.event, times * each.count))
        elif isinstance(each, ComposedEvent):
            waiting += [(one, times) for one in each.events]
        elif isinstance(each, PartitionEvent) and each.passes != 1:
            waiting.append((PartitionEvent(1, each.event), times * each.passes))
        elif times and not isinstance(each, NoEvent):
            found[each] = found.get(each, 0) + times
    return found


def _take(left: dict[Event, int], event: Event, count: int) -> bool:
    """Takes steps from what is left: of the event itself first, then of those that are less private."""
    for each in sorted(left, key=lambda one: one != event):
        if dominates(each, event):
            taken = min(count, left[each])
            left[each] -= taken
            count -= taken
    return count == 0
