"""The bill of a run: which events a step makes due, from what became of every batch that was handed over.

    what happens                                             what is due
    a step on a whole, fresh batch, billed by the step       the event of its sampling
    the first step in a pass, billed by the pass             the event of the pass; later steps of it are paid for
    another release within a pass, billed by the pass        the event of the pass, or what its rest costs (`DrawnOnce`)
    a pass goes on after a resume, with the same release     the event of the pass once more
    a step on any other batch                                a release without amplification, with a warning
    a batch of the pass was left out before this step        its event too, with a warning and a mark
    batches are read ahead                                   each is due once: with its step, or before it where it
                                                             cannot be told from the batch of an earlier step
    a pass that is left early, or that no step is taken in   nothing
    a pass over a stream beyond those that were declared     an error, before anything is written

Every loader counts its passes from 1, so a pass is known by its loader and its number, never by the number alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from privet.accounting.event import DrawnOnce, Event
from privet.accounting.role import LedgerLike
from privet.mechanism import Mechanism
from privet.sampling.base import BatchTicket, Planned
from privet.training.handed_over import HandedOver, Match, Waiting

__all__ = ["Billing"]

_PASSES = 8
"""How many passes are remembered as paid. One that goes on after that is billed again."""


class Billing:
    """Writes to the ledger what a step makes due, before anything of the step is released.

    Args:
        ledger: where it is written.
    """

    def __init__(self, ledger: LedgerLike) -> None:
        self.ledger = ledger
        self.handed_over = HandedOver()
        self._paid: dict[tuple[int, int], Event] = {}  # the passes that were written lately, and their events
        self._begun = 0  # passes of all loaders that were written, since the beginning or the last resume
        self._warned: set[str] = set()
        self._written: list[Event] = []  # of the step at hand
        self._is_paid = False  # whether the step at hand is covered by what was written for the one before

    def begin(self, mechanism: Mechanism, match: Match | None, *, parts_of: BatchTicket | None = None) -> list[Event]:
        """Writes everything that a step makes due, and returns it. Call it before the noise is drawn.

        Args:
            mechanism: what the step releases.
            match: the batch that the step is on, if it is a whole, fresh batch of a private loader.
            parts_of: the batch that only parts of are in the step, where it is not whole.

        Raises:
            BudgetExceededError: if something of it would exceed the budget. What was written before that stays.
        """
        self._written = []
        if self._is_paid:
            return self._written
        if match is None:
            self._warn(
                "a step was taken on a batch that did not come, whole and fresh, from the private loader. It is billed "
                "as a Gaussian release without amplification by sampling, in which each example is in one row. Train "
                "on the loader that make_private returned, one step for each of its batches."
            )
            key = self.handed_over.current_pass if parts_of is None else parts_of.pass_key
            self._begin_left_out(mechanism, key, before=parts_of)
            self._write(mechanism.release)
            if parts_of is not None:
                self.handed_over.take(parts_of)
            return self._written
        self._begin_left_out(mechanism, match.ticket.pass_key, before=match.ticket)
        if len(match.possible) > 1:
            self._begin_in_doubt(mechanism, match)
        waiting = self.handed_over.find(match.ticket)
        self._pay(mechanism, Waiting(match.ticket) if waiting is None else waiting)
        self.handed_over.take(match.ticket)
        return self._written

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a batch that is about to be handed over.

        Raises:
            ProtocolError: if it begins a pass beyond those that its sampling declares. It is not handed over then.
        """
        if ticket.pass_key not in self._paid:
            self._refuse_pass(ticket)
        self.handed_over.announce(ticket)

    @contextmanager
    def paid_already(self) -> Iterator[None]:
        """A context for one more release of the batch of the step before, whose event covers several of them."""
        self._is_paid = True
        try:
            yield
        finally:
            self._is_paid = False

    def resumed(self) -> None:
        """Forgets which pass was paid for: a pass that goes on after a resume is billed again."""
        self._paid.clear()
        self._begun = 0  # a loader that was resumed knows itself how many passes have begun

    def _refuse_pass(self, ticket: BatchTicket) -> None:
        """Raises ProtocolError if the pass of a batch is one more than were declared, whatever loader it is of."""
        sampling: object = ticket.sampling
        if isinstance(sampling, Planned):
            sampling.refuse_pass(self._begun + 1)

    def _begin_left_out(self, mechanism: Mechanism, key: tuple[int, int] | None, *, before: BatchTicket | None) -> None:
        """Bills batches that were left out in the middle of a pass as if they had been trained on, and says so."""
        left_out = [w for w in self.handed_over.of_pass(key) if before is None or w.ticket.index < before.index]
        if all(waiting.told for waiting in left_out):
            return
        self._warn(
            "batches of the private loader were left out, and a later one of the same pass was trained on. They are "
            "billed as if they had been trained on; where the choice depended on their size, content or loss, epsilon "
            "does not cover it. Take a step on every batch: one that is empty is a step like any other."
        )
        self.ledger.mark("batches left out")
        for waiting in left_out:
            self._pay(mechanism, waiting)
            waiting.told = True

    def _begin_in_doubt(self, mechanism: Mechanism, match: Match) -> None:
        """Bills all batches that the step may be on, and says that it cannot be told on which it is."""
        self._warn(
            "batches are read ahead, or left out: several batches of one size wait, and the one that is trained on is "
            "in new tensors, so that it cannot be told which it is. All of them are billed, each once. If none is left "
            "out, epsilon is right. To be sure, hand the loader's own tensors to the model, or read no batch ahead."
        )
        self.ledger.mark("batches read ahead or left out")
        for last in match.possible:
            for waiting in self.handed_over.of_pass(last.pass_key):
                if waiting.ticket.index <= last.index:
                    self._pay(mechanism, waiting)

    def _pay(self, mechanism: Mechanism, waiting: Waiting) -> None:
        """Bills a batch, with its step or before it, unless it, or the pass that it is part of, is written already."""
        drawn = mechanism.drawn_under(waiting.ticket.sampling)
        event, key = drawn.event(1), waiting.ticket.pass_key
        if drawn.sampling.billed_per == "pass":
            paid = self._paid.get(key)
            if paid is None:
                self._refuse_pass(waiting.ticket)
                self._begun += 1
            if paid != event:
                # Noise or sensitivity has changed within the pass, whose draw the steps before have told of.
                changed = paid is not None or self._may_have_changed(event, waiting.ticket)
                self._write(event.rest_of_pass() if changed and isinstance(event, DrawnOnce) else event)
                self._paid[key] = event
                for old in list(self._paid)[:-_PASSES]:
                    del self._paid[old]
        elif waiting.paid != event:
            self._write(event)  # one by one: a budget may be met in the middle
            waiting.paid = event

    def _may_have_changed(self, event: Event, ticket: BatchTicket) -> bool:
        """Returns whether a pass goes on here whose first part, before a resume, may have been another event."""
        phases = self.ledger.phases
        return ticket.index > 0 and (not phases or phases[-1].event != event)

    def _write(self, event: Event) -> None:
        self.ledger.begin(event)
        self._written.append(event)

    def _warn(self, message: str) -> None:
        """Warns once of each thing."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)
