"""The ledger: what was begun, in phases, written before any noise is drawn and never undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from privet._checks import check_at_least, check_count, check_probability
from privet.accounting.accountant import Accountant, get_accountant
from privet.accounting.event import ComposedEvent, Event, NoEvent, Relation, Unit, repeated
from privet.accounting.pld import PldAccountant
from privet.errors import BudgetExceededError, ConfigurationError, LedgerError

__all__ = ["Budget", "Ledger", "Phase", "append", "exceeded", "phases_from", "phases_to", "spent"]

_VERSION = 1


@dataclass(frozen=True)
class Budget:
    """The most that may be spent: ε at δ."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check_at_least("epsilon", self.epsilon))
        object.__setattr__(self, "delta", check_probability("delta", self.delta))


@dataclass(frozen=True)
class Phase:
    """A mechanism, by the event of one step or pass of it, and how many of them were begun."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.event, Event):
            raise ConfigurationError(f"event must be an Event, got {self.event!r}.")
        check_count("count", self.count, 1)

    def whole(self) -> Event:
        """Returns the event of the phase as a whole: k passes of a partition are k participations, for one."""
        return repeated(self.event, self.count)


def append(phases: list[Phase], phase: Phase) -> None:
    """Adds a phase, to the last one where that is of the same event: the run-length encoding."""
    if phases and phases[-1].event == phase.event:
        phases[-1] = Phase(phase.event, phases[-1].count + phase.count)
    else:
        phases.append(phase)


def spent(phases: Iterable[Phase]) -> Event:
    """Returns the event of phases taken together. Phases of one mechanism count together, wherever they stand."""
    counts: dict[Event, int] = {}
    for phase in phases:
        counts[phase.event] = counts.get(phase.event, 0) + phase.count
    events = tuple(repeated(event, count) for event, count in counts.items())
    if not events:
        return NoEvent()
    return events[0] if len(events) == 1 else ComposedEvent(events)


def phases_to(phases: Iterable[Phase]) -> list[dict[str, object]]:
    """Returns phases as plain values for JSON."""
    return [{"event": phase.event.to_dict(), "count": phase.count} for phase in phases]


def phases_from(values: object) -> list[Phase]:
    """Returns the phases that `phases_to` described; anything else is refused with its place."""
    if not isinstance(values, list):
        raise LedgerError(f"phases must be a list, got {type(values).__name__}.")
    found: list[Phase] = []
    for place, value in enumerate(values):
        if not isinstance(value, Mapping) or set(value) != {"event", "count"}:
            raise LedgerError(f"phase {place} must have exactly an event and a count, got {value!r}.")
        try:
            append(found, Phase(Event.from_dict(value["event"]), check_count("count", value["count"], 1)))
        except (ConfigurationError, TypeError) as error:
            raise LedgerError(f"phase {place} is damaged: {error}") from error
    return found


def _within(event: Event, budget: Budget, accountant: Accountant, relation: Relation) -> float:
    """Returns ε at the budget's δ, asked again on a finer grid where a kept one puts it above the budget.

    Grids that outlive a question are up to 3e-4 of ε coarser than a calibration's, and a calibrated run has to fit.
    """
    epsilon = accountant.epsilon(event, budget.delta, relation=relation)
    if budget.epsilon < epsilon <= budget.epsilon * 1.001 and isinstance(accountant, PldAccountant):
        finer = PldAccountant(tolerance=accountant.tolerance / 4.0)
        epsilon = min(epsilon, finer.epsilon(event, budget.delta, relation=relation))
    return epsilon


def exceeded(
    begun: Iterable[Phase], phase: Phase, budget: Budget, accountant: Accountant, relation: Relation
) -> BudgetExceededError | None:
    """Returns the error to raise if `phase` on top of what was begun would exceed the budget, and None if it fits."""
    epsilon = _within(spent([*begun, phase]), budget, accountant, relation)
    if epsilon <= budget.epsilon:
        return None
    return BudgetExceededError(
        f"The next {phase.count} of {phase.event} would bring ε to {epsilon:.6g} at δ = {budget.delta:g}; the budget "
        f"is ε = {budget.epsilon:g}. Nothing was begun. Stop here, or allow more."
    )


class Ledger:
    """Phases in the order they were begun. Append-only: nothing that was begun is ever taken back.

    Guarantees: `begin` returns only after the step is on record; where a budget is set it raises before the step that
    would exceed it, and leaves the ledger as it was; `load_state_dict` and `merge` never lower a count.
    """

    def __init__(
        self,
        *,
        relation: Relation = Relation.ADD_OR_REMOVE_ONE,
        unit: Unit = Unit.EXAMPLE,
        accountant: str | Accountant = "pld",
        budget: Budget | None = None,
    ) -> None:
        self.relation = Relation(relation)
        self.unit = Unit(unit)
        self.accountant = get_accountant(accountant)
        self._budget = budget
        self._phases: list[Phase] = []
        self._marks: dict[str, None] = {}
        # How many more steps of one event are known to fit into the budget: ε only grows, so one look covers many.
        self._fits: tuple[Event, int] | None = None

    @property
    def budget(self) -> Budget | None:
        """The most that may be spent, or None."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget | None) -> None:
        self._budget, self._fits = budget, None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases begun so far, run-length encoded."""
        return tuple(self._phases)

    @property
    def marks(self) -> tuple[str, ...]:
        """Remarks that a reader of ε has to know, such as a reproducible noise key."""
        return tuple(self._marks)

    @property
    def steps(self) -> int:
        """How many steps or passes were begun, over all phases."""
        return sum(phase.count for phase in self._phases)

    def mark(self, text: str) -> None:
        """Adds a remark, once."""
        given: object = text
        if not isinstance(given, str) or not given:
            raise ConfigurationError(f"A mark must be a non-empty text, got {text!r}.")
        self._marks[text] = None

    def begin(self, event: Event, count: int = 1) -> None:
        """Records that `count` steps or passes of `event` begin. Call it before their noise is drawn.

        Raises:
            BudgetExceededError: if they would exceed the budget; the ledger is then unchanged.
        """
        phase = Phase(event, check_count("count", count, 1))
        self._check_budget(phase)
        append(self._phases, phase)

    def event(self) -> Event:
        """Returns everything begun so far as one event, composed of whole phases."""
        return spent(self._phases)

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
        own = accountant is None or accountant == self.accountant.name
        chosen = self.accountant if own else get_accountant(accountant or self.accountant)
        asked = self.relation if relation is None else relation
        budget = self._budget
        if own and budget is not None and delta == budget.delta and asked is self.relation and group_size == 1:
            return _within(self.event(), budget, chosen, asked)
        return chosen.epsilon(self.event(), delta, relation=asked, group_size=group_size)

    def merge(self, other: Ledger) -> None:
        """Adds everything that another ledger on the same data has begun, and its marks."""
        if (other.relation, other.unit) != (self.relation, self.unit):
            raise LedgerError(
                f"Ledgers merge only under one relation and unit; this one has {self.relation.value}, "
                f"{self.unit.value}, the other {other.relation.value}, {other.unit.value}."
            )
        added = other.phases
        for phase in added:
            append(self._phases, phase)
        self._marks |= dict.fromkeys(other.marks)
        self._fits = None

    def state_dict(self) -> dict[str, object]:
        """Returns the ledger as plain values for JSON. The budget and accountant are settings, and not part of it."""
        return {
            "version": _VERSION,
            "relation": self.relation.value,
            "unit": self.unit.value,
            "marks": list(self._marks),
            "phases": phases_to(self._phases),
        }

    def load_state_dict(self, state: object) -> None:
        """Takes over a saved ledger. Steps begun here since it was saved stay billed.

        Raises:
            LedgerError: if it is damaged, or if neither of the two continues the other; nothing is changed then.
        """
        expected = {"version", "relation", "unit", "marks", "phases"}
        if not isinstance(state, Mapping) or set(state) != expected:
            found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise LedgerError(f"A ledger's state has the keys {sorted(expected)}, got {found}.")
        if state["version"] != _VERSION:
            raise LedgerError(f"This version reads ledgers of version {_VERSION}, got {state['version']!r}.")
        if (state["relation"], state["unit"]) != (self.relation.value, self.unit.value):
            raise LedgerError(
                f"The saved ledger is under {state['relation']}, {state['unit']}; this one is under "
                f"{self.relation.value}, {self.unit.value}. Make the ledger with the saved relation and unit."
            )
        marks = state["marks"]
        if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks):
            raise LedgerError(f"marks must be a list of texts, got {marks!r}.")
        phases = phases_from(state["phases"])
        if _continues(phases, self._phases):
            self._phases = phases
        elif not _continues(self._phases, phases):
            raise LedgerError(
                "The saved ledger and this one both hold steps that the other lacks. Load it into a fresh ledger, or "
                "merge the two if both sets of steps ran on the same data."
            )
        self._marks |= dict.fromkeys(marks)
        self._fits = None

    def _check_budget(self, phase: Phase) -> None:
        budget = self.budget
        if budget is None:
            return
        if self._fits is not None and self._fits[0] == phase.event and self._fits[1] >= phase.count:
            self._fits = (phase.event, self._fits[1] - phase.count)
            return
        # Look ahead by a hundredth of the way: the checks of a long run cost next to nothing, and none is skipped.
        ahead = max(phase.count, self.steps // 100)
        error: BudgetExceededError | None = None
        for count in dict.fromkeys((ahead, max(phase.count, ahead // 10), phase.count)):
            error = exceeded(self._phases, Phase(phase.event, count), budget, self.accountant, self.relation)
            if error is None:
                self._fits = (phase.event, count - phase.count)
                return
        if error is not None:
            raise error


def _continues(longer: list[Phase], shorter: list[Phase]) -> bool:
    """Whether `longer` is `shorter` and then perhaps more."""
    if len(longer) < len(shorter):
        return False
    for place, phase in enumerate(shorter):
        other = longer[place]
        last = place == len(shorter) - 1
        if other.event != phase.event or other.count < phase.count or (other.count > phase.count and not last):
            return False
    return True
