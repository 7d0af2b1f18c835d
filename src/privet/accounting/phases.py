"""Phases: how often each mechanism was begun, in order, as a run-length encoding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from privet._checks import check_count
from privet.accounting.event import ComposedEvent, Event, NoEvent, repeated
from privet.errors import ConfigurationError, LedgerError

__all__ = ["Phase", "append", "composed", "phases_from", "phases_to", "spent"]


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
    """Adds a phase to a list: to the last phase where that is of the same event, else as a new one."""
    if phases and phases[-1].event == phase.event:
        phases[-1] = Phase(phase.event, phases[-1].count + phase.count)
    else:
        phases.append(phase)


def composed(counts: Mapping[Event, int]) -> Event:
    """Returns one event for so many steps or passes of each event."""
    events = tuple(repeated(event, count) for event, count in counts.items())
    if not events:
        return NoEvent()
    return events[0] if len(events) == 1 else ComposedEvent(events)


def spent(phases: Iterable[Phase]) -> Event:
    """Returns the event of phases taken together. Phases of one mechanism count together, wherever they stand."""
    counts: dict[Event, int] = {}
    for phase in phases:
        counts[phase.event] = counts.get(phase.event, 0) + phase.count
    return composed(counts)


def phases_to(phases: Iterable[Phase]) -> list[dict[str, object]]:
    """Returns phases as plain values for JSON."""
    return [{"event": phase.event.to_dict(), "count": phase.count} for phase in phases]


def phases_from(values: object) -> list[Phase]:
    """Returns the phases that `phases_to` described.

    Raises:
        LedgerError: for anything else, with the index of the phase.
    """
    if not isinstance(values, list):
        raise LedgerError(f"phases must be a list, got {type(values).__name__}.")
    found: list[Phase] = []
    for index, value in enumerate(values):
        if not isinstance(value, Mapping) or set(value) != {"event", "count"}:
            raise LedgerError(f"phase {index} must have exactly an event and a count, got {value!r}.")
        try:
            append(found, Phase(Event.from_dict(value["event"]), check_count("count", value["count"], 1)))
        except (ConfigurationError, TypeError) as error:
            raise LedgerError(f"phase {index} is damaged: {error}") from error
    return found
