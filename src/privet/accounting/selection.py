"""Selections among the events that an event composes: what accountants treat apart from all the rest.

A selection runs a mechanism a secret, random number of times, and releases the best result only: Papernot and Steinke,
"Hyperparameter Tuning with Renyi Differential Privacy", arXiv 2110.03620.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from privet.accounting.event import (
    ComposedEvent,
    Event,
    NegativeBinomialSelectionEvent,
    NoEvent,
    PoissonSelectionEvent,
    SelfComposedEvent,
)

__all__ = ["SelectionEvent", "Separated", "separated"]

SelectionEvent: TypeAlias = PoissonSelectionEvent | NegativeBinomialSelectionEvent


@dataclass(frozen=True)
class Separated:
    """An event as the composition of its selections, with their counts, and of all the rest."""

    rest: Event
    selections: dict[SelectionEvent, int]

    @property
    def only(self) -> SelectionEvent | None:
        """The selection, where there is one of them, once, and nothing else."""
        if isinstance(self.rest, NoEvent) and list(self.selections.values()) == [1]:
            return next(iter(self.selections))
        return None


def separated(event: Event) -> Separated | None:
    """Returns the event in two parts, or None if it has no selection among the events that it composes.

    A selection inside of a sampled event stays in the rest, where it is an event that nobody knows: ε is infinite.
    """
    rest: list[Event] = []
    selections: dict[SelectionEvent, int] = {}
    waiting = [(event, 1)]
    while waiting:
        each, count = waiting.pop()
        if count == 0 or isinstance(each, NoEvent):
            continue
        if isinstance(each, PoissonSelectionEvent | NegativeBinomialSelectionEvent):
            selections[each] = selections.get(each, 0) + count
        elif isinstance(each, SelfComposedEvent):
            waiting.append((each.event, count * each.count))
        elif isinstance(each, ComposedEvent):
            waiting += [(one, count) for one in reversed(each.events)]
        else:  # not `repeated`: a composition of steps is not always a whole phase
            rest.append(each if count == 1 else SelfComposedEvent(each, count))
    if not selections:
        return None
    return Separated(ComposedEvent(tuple(rest)) if rest else NoEvent(), selections)
