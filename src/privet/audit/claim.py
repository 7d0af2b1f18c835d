"""What a training claims: the events that it wrote down, and how each would read with another noise or rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from privet.accounting.accountant import Accountant, get_accountant
from privet.accounting.discrete import DiscreteGaussianEvent
from privet.accounting.event import (
    ComposedEvent,
    Event,
    GaussianEvent,
    NonPrivateEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
)
from privet.accounting.phases import Phase, spent
from privet.errors import ConfigurationError

__all__ = ["Claim", "noise_of", "rate_of", "with_noise"]


@dataclass(frozen=True)
class Claim:
    """The steps or passes that were billed, in order, and the relation that ε is about."""

    phases: tuple[Phase, ...]
    relation: Relation

    @classmethod
    def of(cls, told: Any) -> Claim:
        """Returns the claim of what a training returned: an engine, a step, a ledger, or an event.

        Raises:
            ConfigurationError: for anything else, and for a training that billed nothing.
        """
        if isinstance(told, Event):
            return cls(tuple(_flattened(told, 1)), Relation.ADD_OR_REMOVE_ONE)
        ledger = getattr(told, "ledger", told)
        phases, relation = getattr(ledger, "phases", None), getattr(ledger, "relation", None)
        if not isinstance(phases, tuple) or not isinstance(relation, Relation):
            raise ConfigurationError(
                f"the training returned {type(told).__name__}. Expected what holds its bill: the PrivacyEngine, the "
                "PrivateStep, a ledger, or the event that is claimed."
            )
        if not phases:
            raise ConfigurationError("the ledger is empty: nothing was trained, and nothing can be audited.")
        return cls(phases, relation)

    @property
    def steps(self) -> int:
        """Returns how many steps or passes were billed."""
        return sum(phase.count for phase in self.phases)

    def each(self) -> Iterator[Event]:
        """Yields the event of each step or pass, in order."""
        for phase in self.phases:
            for _ in range(phase.count):
                yield phase.event

    def epsilon(self, delta: float, accountant: str | Accountant = "pld") -> float:
        """Returns the ε that is claimed at δ."""
        return get_accountant(accountant).epsilon(spent(self.phases), delta, relation=self.relation)

    def least_epsilon(self, delta: float, *, louder: float, accountant: str | Accountant = "pld") -> float:
        """Returns a lower bound on ε at δ of the same events with noise that is `louder` times the claimed one."""
        phases = tuple(Phase(with_noise(phase.event, louder), phase.count) for phase in self.phases)
        bound = get_accountant(accountant).epsilon_bounds(spent(phases), delta, relation=self.relation)
        return bound.lower


def _flattened(event: Event, count: int) -> Iterator[Phase]:
    """Yields the steps of an event that is composed of others."""
    if isinstance(event, ComposedEvent):
        for part in event.events:
            yield from _flattened(part, count)
    elif isinstance(event, SelfComposedEvent):
        yield from _flattened(event.event, count * event.count)
    elif count:
        yield Phase(event, count)


def with_noise(event: Event, louder: float) -> Event:
    """Returns an event with its noise multiplied by `louder`, whatever lies around it."""
    changes: dict[str, Any] = {}
    for item in fields(event):  # type: ignore[arg-type]  # every kind of event is a dataclass
        value = getattr(event, item.name)
        if item.name == "noise_multiplier":
            changes[item.name] = value * louder
        elif isinstance(value, Event):
            changes[item.name] = with_noise(value, louder)
    return replace(event, **changes) if changes else event  # type: ignore[type-var]


def noise_of(event: Event) -> float | None:
    """Returns the noise multiplier of one step, 0 where it has no noise, or None where it is not a Gaussian's."""
    if isinstance(event, GaussianEvent | DiscreteGaussianEvent):
        return event.noise_multiplier
    if isinstance(event, NonPrivateEvent):
        return 0.0
    inner = getattr(event, "event", None)
    return noise_of(inner) if isinstance(inner, Event) else None


def rate_of(event: Event) -> float | None:
    """Returns the rate at which each example is drawn independently, or None where the event claims no such law."""
    return event.rate if isinstance(event, PoissonEvent) else None
