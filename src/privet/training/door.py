"""What both doors offer in the same words: the ledger, its questions, the state of a run, and how they look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from html import escape
from typing import Any, NoReturn, TypeVar, final

from torch import nn

from privet._checks import check_probability, check_target_delta
from privet.accounting.accountant import Accountant
from privet.accounting.budget import Budget
from privet.accounting.event import Relation, Unit
from privet.accounting.ledger import Ledger
from privet.accounting.role import LedgerLike, check_door_ledger
from privet.errors import ConfigurationError, PrivetError, ProtocolError
from privet.mechanism import Mechanism
from privet.parallel import Ranks, ranks_for
from privet.training.checkpoint import load_state, state_of
from privet.training.collective import refuse_mode, refuse_rules
from privet.training.plausible import warn_of_delta
from privet.training.statistics import STATISTICS_MARK, Logger, Statistics, StepStatistics
from privet.training.update import PrivateUpdate

__all__ = ["Door", "door_ledger"]

_E = TypeVar("_E", bound=Enum)
_DELTA = 1e-5  # of the ε that is shown where no budget says a δ


def door_ledger(
    ledger: LedgerLike | None,
    *,
    accountant: str | Accountant | None,
    budget: Budget | None,
    relation: Relation | str | None,
    unit: Unit | str | None,
) -> LedgerLike:
    """Returns the ledger that was given, or a new one in memory with these settings.

    Raises:
        ConfigurationError: if a ledger was given beside a setting that it has itself, if it lacks a part of the role,
            or if its relation does not hold in training.
    """
    settings = {"accountant": accountant, "budget": budget, "relation": relation, "unit": unit}
    twice = [name for name, value in settings.items() if value is not None]
    if ledger is not None and twice:
        raise ConfigurationError(
            f"ledger and {', '.join(twice)} were both given, and a ledger has these settings itself. Expected one of "
            "the two. Make the ledger with them, and give it alone."
        )
    if ledger is not None:
        return check_door_ledger(ledger)
    return check_door_ledger(
        Ledger(
            relation=_member(Relation, "relation", Relation.ZERO_OUT if relation is None else relation),
            unit=_member(Unit, "unit", Unit.EXAMPLE if unit is None else unit),
            accountant="pld" if accountant is None else accountant,
            budget=budget,
        )
    )


def _member(kind: type[_E], name: str, value: object) -> _E:
    """Returns the member of an enumeration that is meant."""
    try:
        return kind(value)
    except ValueError:
        raise ConfigurationError(
            f"{name} must be one of {', '.join(repr(each.value) for each in kind)}, got {value!r}."
        ) from None


class Door(ABC):
    """A way into private training. It has one ledger, to which everything that it releases is written.

    Args:
        ledger: the ledger.
    """

    def __init__(self, ledger: LedgerLike) -> None:
        self._ledger = ledger
        self._records: int | None = None  # the least number of examples in the data of a loader, once one is known
        self._warned_of_delta = False
        self._ranks: Ranks | None = None
        self._statistics: Statistics | None = None

    @final
    def _ranks_for(self, module: nn.Module, mode: str = "auto") -> Ranks:
        """Returns the ranks that train a module, and which this door's ledger is for.

        Raises:
            ConfigurationError: if another module of this door has others, or these do not allow the mode or the module.
        """
        given: object = module
        if not isinstance(given, nn.Module):
            raise ConfigurationError(f"module must be a torch.nn.Module, got {type(given).__name__}.")
        found = ranks_for(module)
        refuse_mode(mode, found.spread)
        refuse_rules(module, found.spread)
        if self._ranks is not None and self._ranks.found != found.found:
            raise ConfigurationError(
                f"this {type(self).__name__} trains a module on {self._ranks.found}, and another on {found.found}. "
                "Expected all of them on the same ranks. Initialize the process group before the first one."
            )
        return found if self._ranks is None else self._ranks.beside(found)

    @final
    def _join_ranks(self, ranks: Ranks) -> None:
        """Takes the ledger of rank 0 for this door's, before anything is written to it here."""
        if self._ranks is None:
            ranks.compare({"ledger": f"{self._ledger.relation.value}, one {self._ledger.unit.value}"})
            self._ranks, self._ledger = ranks, ranks.ledger(self._ledger)

    @abstractmethod
    def _updates(self) -> Sequence[PrivateUpdate]:
        """Returns the updates of all that is trained through this door."""

    @abstractmethod
    def _trained(self) -> Sequence[str]:
        """Returns what is trained, in words, one for each update."""

    # -- the ledger --------------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> LedgerLike:
        """Returns the ledger. It is given as `ledger=` when the door is made, and cannot be replaced."""
        for update in self._updates():
            update.settle()
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: LedgerLike) -> NoReturn:
        raise AttributeError(
            f"the ledger of a {type(self).__name__} cannot be replaced: steps would go on being written to the one "
            f"before. Expected it when the {type(self).__name__} is made. Pass ledger= there."
        )

    @final
    @property
    def accountant(self) -> Accountant:
        """Returns the accountant of `epsilon` and of the budget."""
        return self._ledger.accountant

    @final
    @property
    def budget(self) -> Budget | None:
        """Returns the most that may be spent, or None."""
        return self._ledger.budget

    @final
    def set_budget(self, *, epsilon: float, delta: float) -> None:
        """Makes the step that would exceed the budget raise BudgetExceededError before it is taken.

        Raises:
            ConfigurationError: if δ is 0 or 1, which bound nothing.
        """
        self._ask_about("delta", check_target_delta("delta", delta))
        self._ledger.budget = Budget(epsilon, delta)

    @final
    def epsilon(self, delta: float, *, accountant: str | Accountant | None = None) -> float:
        """Returns ε at `delta` of everything on the ledger, by its accountant or another one.

        Example:
            >>> from privet import PrivacyEngine
            >>> PrivacyEngine().epsilon(delta=1e-5)  # nothing was released yet
            0.0
        """
        self._ask_about("delta", delta)
        return self.ledger.epsilon(delta, accountant=accountant)

    @final
    def get_epsilon(self, delta: float) -> float:
        """Returns ε at `delta` of everything on the ledger: the name that the paper gives to `epsilon`."""
        self._ask_about("delta", delta)
        return self.ledger.epsilon(delta)

    @final
    def _ask_about(self, name: str, delta: object) -> None:
        """Warns once if δ is 1/n or more, where n is known."""
        if not self._warned_of_delta:
            self._warned_of_delta = warn_of_delta(name, check_probability(name, delta), self._records)

    @final
    def _know_records(self, records: int) -> None:
        """Takes note of how many examples the data of a loader has."""
        self._records = records if self._records is None else min(self._records, records)

    @final
    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """Returns what the next step of each private module releases."""
        return tuple(update.mechanism for update in self._updates())

    # -- what is not private -----------------------------------------------------------------------------------------

    @final
    def collect_statistics(
        self, *loggers: Logger, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
    ) -> Statistics:
        """Begins to collect how many gradients each step clips and how long they are, and marks the ledger.

        NOT PRIVATE: these numbers have no noise, and ε does not cover them. They are for those who hold the data.

        Args:
            loggers: each is called with the `StepStatistics` of every logical step, such as a `CSVLogger`.
            quantiles: the levels of the quantiles of norms.

        Raises:
            ProtocolError: if nothing is private yet.
        """
        if not self._updates():
            raise ProtocolError("nothing is private here yet. Expected make_private first, then collect_statistics.")
        self._statistics = Statistics(quantiles=quantiles, loggers=loggers)
        self._ledger.mark(STATISTICS_MARK)
        for model, update in enumerate(self._updates()):
            update.watcher = self._statistics.of_model(model)
        return self._statistics

    @final
    @property
    def statistics(self) -> StepStatistics | None:
        """Returns what clipping did in the last logical step; None before the first. NOT PRIVATE: it has no noise.

        Raises:
            ProtocolError: if nothing is collected: it has to be asked for.
        """
        if self._statistics is None:
            raise ProtocolError(
                "statistics are not collected: they have no noise, and ε does not cover them. Expected to be asked "
                "first, which marks the ledger. Call collect_statistics()."
            )
        return self._statistics.latest

    # -- the state of the run ----------------------------------------------------------------------------------------

    @final
    def state_dict(self) -> dict[str, Any]:
        """Returns the ledger and the counters of the run, without any key, for a checkpoint of your own.

        Save it beside the states of the model and the optimizer: without it, a resumed run forgets what was spent.
        """
        return state_of(self._ledger, self._updates())

    @final
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a saved state: adds what its ledger holds, and goes on with a fresh noise key.

        Steps that were taken here since are still billed.

        Raises:
            ConfigurationError: if the settings differ from those of the saved run. Nothing is changed then.
            LedgerError: if the saved ledger does not fit. Nothing is changed then.
        """
        load_state("the state", state, ledger=self._ledger, updates=self._updates())

    # -- how it looks ------------------------------------------------------------------------------------------------

    def _rows(self) -> list[tuple[str, str]]:
        """Returns what runs, as pairs of words."""
        ledger, budget = self.ledger, self._ledger.budget
        delta = _DELTA if budget is None else budget.delta
        try:
            spent = f"{ledger.epsilon(delta):.4g} at δ = {delta:g}"
        except PrivetError as error:
            spent = f"unknown ({type(error).__name__})"
        rows = [
            ("ε", spent),
            ("budget", "none" if budget is None else f"ε = {budget.epsilon:g} at δ = {budget.delta:g}"),
            ("accountant", ledger.accountant.name),
            *([] if self._ranks is None else [("ranks", self._ranks.found)]),
            (
                "ledger",
                f"{type(ledger).__name__}, {ledger.steps} begun, {ledger.relation.value}, one {ledger.unit.value}",
            ),
        ]
        rows += [("mark", mark) for mark in ledger.marks]
        for name, update in zip(self._trained(), self._updates(), strict=True):
            now = update.mechanism
            rows.append((name, f"{now.sampling}, {now.clipping}, {now.noise}, divided by {update.divisor.value}"))
        return rows

    @final
    def __repr__(self) -> str:
        lines = "\n".join(f"  {name}: {value}" for name, value in self._rows())
        return f"<{type(self).__name__}\n{lines}>"

    @final
    def _repr_html_(self) -> str:
        """Returns the same as a table, for notebooks."""
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in self._rows())
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"
