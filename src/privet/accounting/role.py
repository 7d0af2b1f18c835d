"""The role of a ledger: all that the doors, checkpoints and other ledgers ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from privet.accounting.accountant import Accountant
from privet.accounting.budget import Budget
from privet.accounting.event import Event, NonPrivateEvent, Relation, Unit
from privet.accounting.phases import Phase
from privet.errors import ConfigurationError

__all__ = ["LedgerLike", "begin_non_private", "check_door_ledger", "check_ledger"]


class LedgerLike(Protocol):
    """A record of steps, written before their noise is drawn. `Ledger` and `FileLedger` fill the role.

    Whatever fills it must keep three promises. `begin` returns only after the steps are on record, or raises with
    nothing begun. No method takes anything back that was begun. `load_state_dict` and `merge` add what was missing,
    and count nothing twice that they can tell apart.
    """

    relation: Relation
    unit: Unit
    budget: Budget | None

    @property
    def accountant(self) -> Accountant:
        """The accountant of `epsilon` and of the budget."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases begun so far, run-length encoded."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Remarks that a reader of ε has to know."""

    @property
    def steps(self) -> int:
        """How many steps or passes were begun."""

    def mark(self, text: str) -> None:
        """Adds a remark, once."""

    def begin(self, event: Event, count: int = 1) -> None:
        """Records that `count` steps or passes of `event` begin; raises BudgetExceededError before they do."""

    def event(self) -> Event:
        """Returns everything begun so far as one event."""

    def epsilon(
        self,
        delta: float,
        *,
        accountant: str | Accountant | None = None,
        relation: Relation | None = None,
        group_size: int = 1,
    ) -> float:
        """Returns an upper bound on ε at δ of everything begun so far."""

    def merge(self, other: LedgerLike) -> None:
        """Adds everything that another ledger on the same data has begun."""

    def state_dict(self) -> Mapping[str, object]:
        """Returns the ledger as plain values for JSON."""

    def load_state_dict(self, state: object) -> None:
        """Adds what a saved ledger holds and this one lacks."""


_MEMBERS = sorted({*LedgerLike.__annotations__, *(name for name in vars(LedgerLike) if not name.startswith("_"))})


def check_ledger(ledger: object) -> LedgerLike:
    """Returns the object if it fills the role of a ledger.

    Raises:
        ConfigurationError: if it lacks a part of the role, with the names of all parts that are missing.
    """
    # The class is asked first: to look at a property of an object may read a file.
    missing = [name for name in _MEMBERS if not (hasattr(type(ledger), name) or hasattr(ledger, name))]
    if missing or isinstance(ledger, type):
        what = f"the class {ledger.__name__}" if isinstance(ledger, type) else type(ledger).__name__
        raise ConfigurationError(
            f"ledger must fill the whole role of a ledger, got {what}"
            + (f", which lacks {', '.join(missing)}" if missing else "")
            + ". Expected a Ledger, a FileLedger, or an object with every member of LedgerLike."
        )
    return ledger  # type: ignore[return-value]  # just checked, by name


def check_door_ledger(ledger: object) -> LedgerLike:
    """Returns the object if it fills the role of a ledger, under a relation that holds for training.

    Raises:
        ConfigurationError: if it does not.
    """
    found = check_ledger(ledger)
    if found.relation not in (Relation.ZERO_OUT, Relation.REPLACE_ONE):
        raise ConfigurationError(
            f"ledger is under {found.relation.value}, and the number of examples is public in training: the batch size "
            "and the divisor follow from it. Expected zero_out or replace_one. Make the ledger with "
            "relation=Relation.ZERO_OUT."
        )
    return found


def begin_non_private(ledger: LedgerLike, mark: str) -> None:
    """Writes to the ledger that something happened without privacy, whatever the budget: ε is infinite from now on."""
    budget, ledger.budget = ledger.budget, None  # it would keep what has happened already from being written down
    try:
        ledger.mark(mark)
        ledger.begin(NonPrivateEvent())
    finally:
        ledger.budget = budget
