"""The ledger: what was begun, written before any noise is drawn and never undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import final

from privet._checks import check_count
from privet.accounting.accountant import Accountant, Bound, get_accountant
from privet.accounting.budget import Budget, BudgetMeter
from privet.accounting.event import Event, Relation, Unit
from privet.accounting.phases import Phase, composed
from privet.accounting.record import LOCK, Record, RunId, check_mark
from privet.accounting.role import LedgerLike
from privet.errors import LedgerError

__all__ = ["AbstractLedger", "Ledger"]


class AbstractLedger(ABC):
    """What every ledger does with its record, wherever that is kept: the questions, states, and joining.

    A subclass fills `_current`, `_join`, `mark` and `begin`.

    Args:
        relation: the neighboring relation that ε is said for.
        unit: whose data "one" is in the relation. It is said with ε and never computed with: no accountant converts
            one unit into another. Events must be about sums whose sensitivity is bounded for this unit.
        accountant: what `epsilon` and the budget use.
        budget: the most that may be spent, or None.
        label: words that the ids of this ledger's runs begin with.
    """

    def __init__(
        self,
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        unit: Unit = Unit.EXAMPLE,
        accountant: str | Accountant = "pld",
        budget: Budget | None = None,
        label: str | None = None,
    ) -> None:
        self.relation = Relation(relation)
        self.unit = Unit(unit)
        self._accountant = get_accountant(accountant)
        self._run = RunId(label)
        self.budget = budget

    @abstractmethod
    def _current(self) -> Record:
        """Returns the record as it is now. It is read under the lock, and not changed."""

    @abstractmethod
    def _join(self, other: Record) -> None:
        """Adds to the record what `other` holds beyond it, or raises LedgerError with nothing changed."""

    @abstractmethod
    def mark(self, text: str) -> None:
        """Adds a remark, once."""

    @abstractmethod
    def begin(self, event: Event, count: int = 1) -> None:
        """Records that `count` steps or passes of `event` begin. Call it before their noise is drawn.

        Raises:
            BudgetExceededError: if they would exceed the budget. Nothing is begun then.
        """

    @property
    def run(self) -> str:
        """The id under which this ledger, in this process, puts steps on record."""
        return self._run.value

    @property
    def accountant(self) -> Accountant:
        """The accountant of `epsilon` and of the budget."""
        return self._accountant

    @property
    def budget(self) -> Budget | None:
        """The most that may be spent, or None. Setting it takes effect at the next step."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget | None) -> None:
        self._budget = budget
        self._meter = None if budget is None else BudgetMeter(budget, self._accountant, self.relation)

    @final
    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases begun so far, one run after the other, run-length encoded."""
        with LOCK:
            return self._current().phases

    @final
    @property
    def marks(self) -> tuple[str, ...]:
        """Remarks that a reader of ε has to know, such as a reproducible noise key."""
        with LOCK:
            return tuple(self._current().marks)

    @final
    @property
    def steps(self) -> int:
        """How many steps or passes were begun, over all phases."""
        with LOCK:
            return self._current().steps

    @final
    def event(self) -> Event:
        """Returns everything begun so far as one event, composed of whole phases."""
        with LOCK:
            return composed(self._current().totals)

    @final
    def epsilon(
        self,
        delta: float,
        *,
        accountant: str | Accountant | None = None,
        relation: Relation | None = None,
        group_size: int = 1,
    ) -> float:
        """Returns an upper bound on ε at δ of everything begun so far: 0 for an empty ledger."""
        # Asked for by its name, the ledger's own accountant serves: it keeps grids between questions.
        own = accountant is None or accountant == self._accountant.name
        chosen = self._accountant if own else get_accountant(accountant or self._accountant)
        asked = self.relation if relation is None else relation
        budget, event = self.budget, self.event()
        if own and budget is not None and delta == budget.delta and asked is self.relation and group_size == 1:
            return chosen.epsilon_near(event, budget.delta, budget.epsilon, relation=asked)
        return chosen.epsilon(event, delta, relation=asked, group_size=group_size)

    @final
    def epsilon_bounds(self, delta: float, *, group_size: int = 1) -> Bound:
        """Returns both bounds on ε at δ with all that a reader has to know: whose data it is about, and the marks."""
        bound = self._accountant.epsilon_bounds(self.event(), delta, relation=self.relation, group_size=group_size)
        said = (f"one unit is one {self.unit.value}, as the events are about; no accountant converts units",)
        return replace(bound, notes=(*bound.notes, *said, *self.marks))

    @final
    def merge(self, other: LedgerLike) -> None:
        """Adds everything that another ledger on the same data has begun, and its marks.

        Steps of a run that both ledgers know are counted once, so merging again adds nothing.

        Raises:
            LedgerError: if the other ledger is under another relation or unit. Nothing is changed then.
        """
        if (other.relation, other.unit) != (self.relation, self.unit):
            raise LedgerError(
                f"Ledgers merge only under one relation and unit; this one has {self.relation.value}, "
                f"{self.unit.value}, the other {other.relation.value}, {other.unit.value}. No accountant converts them."
            )
        self.load_state_dict(other.state_dict())

    @final
    def state_dict(self) -> dict[str, object]:
        """Returns the ledger as plain values for JSON. The budget and accountant are settings, and not part of it."""
        with LOCK:
            return self._current().state(self.relation.value, self.unit.value)

    @final
    def load_state_dict(self, state: object) -> None:
        """Adds to the ledger what a saved ledger holds beyond it. Nothing that was begun here is given up.

        Runs are told apart by their ids. An earlier state of this ledger changes nothing, the state of another run is
        added, and of two runs that both continued one checkpoint the steps of each are counted once. A state of
        version 1 has no ids: it is taken for another run each time it is loaded.

        Raises:
            LedgerError: if the state is damaged, or of another relation or unit. Nothing is changed then.
        """
        self._join(Record.of_state(state, self.relation.value, self.unit.value))

    @final
    def __repr__(self) -> str:
        budget = "" if self.budget is None else f", budget ε = {self.budget.epsilon:g} at δ = {self.budget.delta:g}"
        return (
            f"<{type(self).__name__}: {self.steps} steps begun, {self.relation.value}, one {self.unit.value}, "
            f"accountant {self._accountant.name!r}{budget}>"
        )


@final
class Ledger(AbstractLedger):
    """A ledger in memory. Append-only: nothing that was begun is ever taken back.

    Guarantees: `begin` returns only after the step is on record; where a budget is set it raises before the step that
    would exceed it, and leaves the ledger as it was; `load_state_dict` and `merge` never lower a count. A deep copy, an
    unpickled copy and a forked child go on as runs of their own.

    Example:
        >>> from privet.accounting import Budget, GaussianEvent, Ledger, PoissonEvent
        >>> ledger = Ledger(budget=Budget(epsilon=3.0, delta=1e-5))
        >>> ledger.begin(PoissonEvent(0.01, GaussianEvent(1.0)), 1000)
        >>> round(ledger.epsilon(1e-5), 2)
        1.83
    """

    def __init__(
        self,
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        unit: Unit = Unit.EXAMPLE,
        accountant: str | Accountant = "pld",
        budget: Budget | None = None,
    ) -> None:
        super().__init__(relation=relation, unit=unit, accountant=accountant, budget=budget)
        self._record = Record()

    def _current(self) -> Record:
        return self._record

    def _join(self, other: Record) -> None:
        with LOCK:
            added = self._record.join(other)
            for phase in added:
                if self._meter is not None:
                    self._meter.began(phase.event, phase.count)
            if added:  # what is begun from now on comes after it
                self._run.renew()

    def mark(self, text: str) -> None:
        """Adds a remark, once."""
        with LOCK:
            self._record.marks[check_mark(text)] = None

    def begin(self, event: Event, count: int = 1) -> None:
        """Records that `count` steps or passes of `event` begin. Call it before their noise is drawn.

        Raises:
            BudgetExceededError: if they would exceed the budget; the ledger is then unchanged.
        """
        phase = Phase(event, check_count("count", count, 1))
        with LOCK:
            if self._meter is not None:
                self._meter.admit(event, phase.count, self._record.totals)
            self._record.add(self._run.value, phase)
