"""The batches that private loaders handed over and that no step has taken yet, and which of them a backward is on.

A loop may read ahead: a batch is handed over while an earlier one is still to be trained on (prefetchers, accelerate).
So batches wait here in order, pass by pass, and each is taken by one step at most.

    which waiting batch                                                          is taken as
    its tensors were given to the model, or views of them                        that one: it is known. If a step has
                                                                                 taken it, a batch of the user's own
    no tensors are known, and only one of the pass has as many examples as there are rows   that one
    several of that size wait in that pass                                       the oldest; all of them are in doubt
    some wait in it, and none has as many examples                               refused: rows are not examples
    none waits in it                                                             a batch of the user's own
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from privet.accounting.event import Event
from privet.errors import ProtocolError
from privet.sampling.base import BatchTicket
from privet.sampling.recognition import places_of, signatures_of

__all__ = ["HandedOver", "Match", "Waiting"]

_PASSES = 8
"""How many passes are remembered. A step on a batch of an older one is billed as on a batch of the user's own."""

_PLACES = 4096
"""How many places of memory are remembered before those of batches that are gone are forgotten."""


@dataclass(eq=False)
class Waiting:
    """A logical batch on which no step was taken yet."""

    ticket: BatchTicket
    paid: Event | None = None  # what was billed for it while it waited
    told: bool = False  # whether it was said to be left out


@dataclass(frozen=True, eq=False)
class Match:
    """The batch that a backward is on, and all that it may be on: one, where that is certain."""

    ticket: BatchTicket
    possible: tuple[BatchTicket, ...]

    @staticmethod
    def certain(ticket: BatchTicket) -> Match:
        """Returns the match of a batch that is known."""
        return Match(ticket, (ticket,))


class HandedOver:
    """Keeps the batches that wait, and finds the one that a backward is on."""

    def __init__(self) -> None:
        self._passes: dict[tuple[int, int], list[Waiting]] = {}
        self._pass: tuple[int, int] | None = None  # of the batch that was handed over last
        self.latest: BatchTicket | None = None  # the batch, or part of one, that was handed over last
        self._ended: tuple[int, int] | None = None  # the last pass that was handed over to its end
        self._places: dict[object, list[BatchTicket]] = {}  # where the tensors lie of batches that may be read ahead

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a batch, or of a further part of one, that is about to be handed over."""
        self._pass, self.latest = ticket.pass_key, ticket
        if ticket.ends_pass:
            self._ended = ticket.pass_key
        if (ticket.whole or ticket.parts > 1 or ticket.owner is not None) and ticket.leaves is not None:
            self._index(ticket)
        waiting = self._passes.setdefault(self._pass, [])
        if waiting and waiting[-1].ticket.of_same_batch(ticket):
            waiting[-1].ticket = ticket
            return
        waiting.append(Waiting(ticket))
        for old in list(self._passes)[:-_PASSES]:
            del self._passes[old]

    def _index(self, ticket: BatchTicket) -> None:
        """Takes note of where the tensors of a batch lie, and forgets batches whose memory is another's by now."""
        assert ticket.leaves is not None
        for place in ticket.leaves.places:
            self._places[place] = [*self._at(place), ticket]
        if len(self._places) > _PLACES:
            self._places = {place: found for place in self._places if (found := self._at(place))}

    def _at(self, place: object) -> list[BatchTicket]:
        """Returns the batches that have a living tensor at a place."""
        return [t for t in self._places.get(place, ()) if t.leaves is not None and place in t.leaves.places_now]

    def recognized(self, tensors: Iterable[Tensor]) -> BatchTicket | None:
        """Returns the ticket of the one batch that the tensors are of, whether it waits or was taken, or None."""
        tensors = list(tensors)
        found = {id(ticket): ticket for place in places_of(tensors) for ticket in self._at(place)}
        if not found:
            found = {id(ticket): ticket for ticket in self._alike(tensors)}
        ticket = next(iter(found.values())) if len(found) == 1 else None
        if ticket is not None and ticket.owner is not None and ticket.leaves is not None:
            # A table of users is by place: that one of the tensors is as it was does not say so of the others.
            return None if ticket.leaves.changed(tensors, ticket.size) else ticket
        return ticket

    def _alike(self, tensors: list[Tensor]) -> list[BatchTicket]:
        """Returns the batches that wait and have the same contents, of those whose contents are known."""
        waiting = [one.ticket for passed in self._passes.values() for one in passed]
        signed = [ticket for ticket in waiting if ticket.leaves is not None and ticket.leaves.signatures]
        return [t for t in signed if t.leaves and not t.leaves.signatures.isdisjoint(signatures_of(tensors, t.size))]

    def match(self, examples: int, known: BatchTicket | None) -> Match | None:
        """Returns which batch a backward on `examples` rows is on, or None for a batch of the user's own.

        Args:
            examples: the rows that the backward ran on.
            known: the batch whose tensors the model was given, if that was seen.

        Raises:
            ProtocolError: if batches wait, and the rows are not the examples of any of them.
        """
        if known is not None:
            if known.size != examples:
                self._refuse(examples, known)
            return None if self.find(known) is None else Match.certain(known)
        # Batches that an abandoned pass left waiting would lend their tickets to any other. Those of a pass that was
        # handed over to its end, while the next one has begun, are read ahead.
        ended = [one.ticket for one in self.of_pass(self._ended) if self._ended != self._pass and not one.told]
        waiting = [*ended, *(one.ticket for one in self.of_pass(self._pass))]
        if waiting and all(ticket.size != examples for ticket in waiting):
            self._refuse(examples, waiting[-1])
        possible = tuple(ticket for ticket in waiting if ticket.size == examples and ticket.whole)
        if not possible or any(ticket.sampling != possible[0].sampling for ticket in possible):
            return None  # of two laws, and none can be excluded: billed as not sampled, which covers either
        return Match(possible[0], possible)

    def find(self, ticket: BatchTicket) -> Waiting | None:
        """Returns the waiting batch of a ticket, or None if a step has taken it."""
        return next((one for one in self.of_pass(ticket.pass_key) if one.ticket.of_same_batch(ticket)), None)

    def of_pass(self, key: tuple[int, int] | None) -> list[Waiting]:
        """Returns the waiting batches of a pass, in order."""
        return list(self._passes.get(key, ())) if key is not None else []

    @property
    def current_pass(self) -> tuple[int, int] | None:
        """Returns the pass that the last batch is of."""
        return self._pass

    def take(self, ticket: BatchTicket) -> None:
        """Ends the wait of a batch: a step has taken it."""
        kept = [one for one in self.of_pass(ticket.pass_key) if not one.ticket.of_same_batch(ticket)]
        if ticket.pass_key in self._passes:
            self._passes[ticket.pass_key] = kept

    @staticmethod
    def _refuse(examples: int, ticket: BatchTicket) -> None:
        raise ProtocolError(
            f"a backward ran on {examples} rows, and the private loader handed over a batch of {ticket.size} examples. "
            "Epsilon bounds what one row can do, and here an example may be in several rows, or a row may hold several "
            f"examples. Expected one row for each example: {ticket.size} rows. More rows come from several views or "
            "crops of an example (torch.cat, flatten(0, 1)), from windows cut out of a record, or from packed "
            "sequences; other numbers from sequence-first data without batch_first=False, or from a slice or a mask. "
            "For several views use privet.Augmented (a forward for each, then one backward). To leave examples out, "
            "give them a loss of zero. Or make the windows the records of the dataset, and ask the ledger for "
            "epsilon(delta, group_size=K), where a person has at most K of them. Nothing was released."
        )
