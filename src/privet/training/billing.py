"""The bill of a run: which events a step makes due, from what became of every batch that was handed over.

    what happens                                             what is due
    a step on a whole, fresh batch, billed by the step       the event of its sampling
    the first step in a pass, billed by the pass             the event of the pass; later steps of it are paid for
    a step on any other batch                                a release without amplification, with a warning
    a batch of the pass was left out before this step        its event too, with a warning and a mark
    a pass that is left early, or that no step is taken in   nothing

Every loader counts its passes from 1, so a pass is known by its loader and its number, never by the number alone.
"""

from __future__ import annotations

import warnings
from collections import Counter

from privet.accounting.event import Event
from privet.accounting.role import LedgerLike
from privet.mechanism import Mechanism
from privet.sampling.base import BatchTicket, Sampling

__all__ = ["Billing"]


class Billing:
    """Writes to the ledger what a step makes due, before anything of the step is released.

    Args:
        ledger: where it is written.
    """

    def __init__(self, ledger: LedgerLike) -> None:
        self.ledger = ledger
        self._pass: tuple[int, int] | None = None  # the pass that the last batch is of
        self._left_out: dict[tuple[int, int], Counter[Sampling | None]] = {}  # batches of each pass, by their sampling
        self._paid: tuple[tuple[int, int], Event] | None = None  # the last pass that was written, and its event
        self._warned: set[str] = set()

    def announced(self, ticket: BatchTicket, *, given_up: BatchTicket | None) -> None:
        """Takes note of a batch that is handed over, and of the batch before it, if no step was taken on that."""
        if given_up is not None and not given_up.of_same_batch(ticket):
            self.given_up(given_up)
        self._pass = ticket.pass_key

    def given_up(self, ticket: BatchTicket) -> None:
        """Takes note of a batch that no step is taken on. It is due when a later one of its pass is trained on."""
        self._left_out.setdefault(ticket.pass_key, Counter())[ticket.sampling] += 1

    def begin(self, mechanism: Mechanism, ticket: BatchTicket | None) -> None:
        """Writes everything that a step makes due. Call it before the noise is drawn.

        Args:
            mechanism: what the step releases.
            ticket: of the batch, if it is a whole, fresh batch of a private loader.

        Raises:
            BudgetExceededError: if something of it would exceed the budget. What was written before that stays.
        """
        event = self._event(mechanism, ticket)
        self._begin_left_out(mechanism)
        if event is not None:
            self.ledger.begin(event)
            if ticket is not None:
                self._paid = ticket.pass_key, event

    def resumed(self) -> None:
        """Forgets which pass was paid for: a pass that goes on after a resume is billed again."""
        self._paid = None

    def _event(self, mechanism: Mechanism, ticket: BatchTicket | None) -> Event | None:
        """Returns the event of the step, or None if the pass that it is part of is written already."""
        if ticket is None:
            self._warn(
                "a step was taken on a batch that did not come, whole and fresh, from the private loader. It is billed "
                "as a Gaussian release without amplification by sampling. Train on the loader that make_private "
                "returned, one step for each of its batches."
            )
            return mechanism.noise.event
        drawn = mechanism.drawn_under(ticket.sampling)
        event = drawn.event(1)
        paid = drawn.sampling.billed_per == "pass" and self._paid == (ticket.pass_key, event)
        return None if paid else event

    def _begin_left_out(self, mechanism: Mechanism) -> None:
        """Bills batches that were left out in the middle of a pass as if they had been trained on, and says so."""
        left_out = None if self._pass is None else self._left_out.get(self._pass)
        if not left_out:
            return
        self._warn(
            "batches of the private loader were left out, and a later one of the same pass was trained on. They are "
            "billed as if they had been trained on; where the choice depended on their size, content or loss, epsilon "
            "does not cover it. Take a step on every batch: one that is empty is a step like any other."
        )
        self.ledger.mark("batches left out")
        for sampling in list(left_out):
            drawn = mechanism.drawn_under(sampling)
            while left_out[sampling]:
                if drawn.sampling.billed_per == "step":
                    self.ledger.begin(drawn.event(1))  # one by one: a budget may be met in the middle
                left_out[sampling] -= 1
            del left_out[sampling]

    def _warn(self, message: str) -> None:
        """Warns once of each thing."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)
