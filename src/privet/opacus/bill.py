"""The bill of an engine's optimizer: what each release is, from what became of the batches of its loader.

    what is in the sum                                               what is counted
    one whole, fresh batch of the Poisson loader                     (σ, q)
    a batch of a loader that keeps the order, first of its pass      (σ, 1); later ones of the pass are paid for
    several such batches of one pass                                 the same: an example is in one of them
    anything else, of k backwards                                    (σ / k, 1), and a warning: one may be in all

Rows are counted before the noise is drawn. Batches are told apart by the core's tickets (`privet.training.billing`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from privet.accounting.event import Event, GaussianEvent, NonPrivateEvent, PartitionEvent, PoissonEvent
from privet.accounting.phases import Phase
from privet.clipping import ClippingPolicy
from privet.errors import AccountingError
from privet.mechanism import Gaussian, Mechanism
from privet.opacus.accountants.accountant import IAccountant
from privet.opacus.warning import warn
from privet.sampling.base import BatchTicket
from privet.sampling.loader import PrivateLoader
from privet.training.billing import Billing
from privet.training.guard import Guard
from privet.training.handed_over import Match

__all__ = ["EngineBill", "HistoryLedger", "RateBill"]


class HistoryLedger:
    """What the core's billing writes to: events become entries in the history of the engine's accountant.

    Args:
        accountant: returns the accountant of the engine as it is now.
    """

    budget: Any = None
    phases: tuple[Phase, ...] = ()  # none that billing could read back

    def __init__(self, accountant: Callable[[], IAccountant]) -> None:
        self._accountant = accountant
        self.marks: list[str] = []

    def mark(self, text: str) -> None:
        """Warns of a remark that a reader of ε has to know, once."""
        if text not in self.marks:
            self.marks.append(text)
            warn(f"a remark on this run, which epsilon has to be read with: {text}.")

    def begin(self, event: Event, count: int = 1) -> None:
        """Adds an event to the history, before anything of it is released."""
        noise_multiplier, sample_rate = _entry(event)
        for _ in range(count):
            self._accountant().step(noise_multiplier=noise_multiplier, sample_rate=sample_rate)


def _entry(event: Event) -> tuple[float, float]:
    """Returns an event as noise multiplier and sample rate."""
    if isinstance(event, PartitionEvent) and event.passes == 1:
        return _entry(event.event)
    if isinstance(event, PoissonEvent) and isinstance(event.event, GaussianEvent):
        return event.event.noise_multiplier, event.rate
    if isinstance(event, GaussianEvent):
        return event.noise_multiplier, 1.0
    if isinstance(event, NonPrivateEvent):
        return 0.0, 1.0
    raise AccountingError(
        f"{event} has no place in a history of noise multipliers and sample rates. Expected a Gaussian release, "
        "sampled or not. Train with privet.PrivacyEngine, whose ledger holds any event."
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """The rows of one backward that are in the sum, and the batch that they are of, if that is known."""

    examples: int
    part: BatchTicket | None  # a physical part of a batch
    match: Match | None  # a batch in one piece


class EngineBill:
    """Bills the releases of one optimizer.

    Args:
        parameters: the private parameters by name, watched against changes without privacy.
        loader: the private loader, which announces its batches.
        accountant: returns the engine's accountant.
        optimizer: the wrapped optimizer, which may step on released gradients alone.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        loader: PrivateLoader,
        accountant: Callable[[], IAccountant],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._ledger = cast("Any", HistoryLedger(accountant))  # of the role of a ledger, what billing asks
        self._billing = Billing(self._ledger)
        self._sampling = loader.sampling
        self._at_hand: BatchTicket | None = None
        self._parts = 0  # of the logical batch at hand that were handed over
        self._known: BatchTicket | None = None
        self._waiting: list[_Piece] = []  # of backwards that were not clipped yet
        self._pieces: list[_Piece] = []  # of the sum
        self.guard = Guard(parameters, self._ledger)
        self.guard.attach(cast("Any", _Nobody()))  # no optimizer may step on what was not released
        loader.on_batch(self._announce)

    def _announce(self, ticket: BatchTicket) -> None:
        self._at_hand, self._parts = ticket, 1 if ticket.first else self._parts + 1
        self._billing.handed_over.announce(ticket)

    def before(self, tensors: list[Tensor], anew: bool) -> None:  # noqa: FBT001 - as the hooks call it
        """Takes note of what a forward is given, by which its batch may be known."""
        if anew:
            self.guard.hides()
            self._known = self._billing.handed_over.recognized(tensors)

    def after(self, examples: int) -> None:
        """Takes note of a backward."""
        known, self._known, at_hand = self._known, None, self._at_hand
        if at_hand is not None and not at_hand.whole:
            piece = _Piece(examples, at_hand if at_hand.size == examples else None, None)
        else:
            piece = _Piece(examples, None, self._billing.handed_over.match(examples, known))
        self._waiting.append(piece)
        self.guard.shows()

    def clipped(self, examples: Sequence[int]) -> None:
        """Takes note that rows were clipped and added to the sum: so many of each backward."""
        self.guard.hides()
        waiting, self._waiting = self._waiting[-len(examples) :], []
        for position, count in enumerate(examples):
            piece = waiting[position] if position < len(waiting) else None
            if piece is None or piece.examples != count:  # rows of the user's own
                piece = _Piece(count, None, None)
            self._pieces.append(piece)

    def begin(self, noise_multiplier: float, policy: ClippingPolicy) -> None:
        """Counts the release of the sum, before its noise is drawn."""
        pieces, self._pieces = self._pieces, []
        mechanism = Mechanism(self._sampling, policy, Gaussian(noise_multiplier))
        match = self._match(pieces)
        if match is not None:
            for each in match:
                self._billing.begin(mechanism, each)
            return
        backwards = max(1, len(pieces))
        if backwards > 1:
            warn(
                f"{backwards} batches were added up in one step, and an example may be in all of them. The step is "
                f"counted as one that nothing amplifies, with {backwards} times the sensitivity. Opacus counts it as "
                "one sampled step. For a larger batch, give the loader the whole batch size and use BatchMemoryManager."
            )
        parts_of = next((piece.part for piece in reversed(pieces) if piece.part is not None), None)
        weakened = Mechanism(self._sampling, policy, Gaussian(noise_multiplier / backwards))
        self._billing.begin(weakened, None, parts_of=parts_of)

    def _match(self, pieces: Sequence[_Piece]) -> list[Match] | None:
        """Returns the batches that the sum is of, if it is of whole batches in which no example is twice."""
        whole = [piece.match for piece in pieces if piece.match is not None]
        if pieces and len(whole) == len(pieces):
            one_pass = {match.ticket.pass_key for match in whole}
            # Two random steps of a pass in one sum would be one step that an example is in with twice the probability.
            fixed = self._sampling.billed_per == "pass" and not self._sampling.random_size
            apart = fixed and len(one_pass) == 1
            return whole if len(whole) == 1 or (apart and _all_apart(whole)) else None
        parts = [piece.part for piece in pieces if piece.part is not None]
        if not parts or len(parts) < len(pieces):
            return None
        first, last = parts[0], parts[-1]
        batch = all(part.of_same_batch(first) for part in parts) and first.first and last.last
        # None was left out, whatever the reason, and none is in it twice.
        all_of_it = self._at_hand is last and len({id(part) for part in parts}) == len(parts) == self._parts
        return [Match.certain(last)] if batch and all_of_it else None


def _all_apart(matches: Sequence[Match]) -> bool:
    """Returns whether all batches are known, and no two are the same."""
    certain = all(len(match.possible) == 1 for match in matches)
    return certain and len({match.ticket.index for match in matches}) == len(matches)


class _Nobody:
    """Stands for the optimizer that may step on any gradient: there is none."""


class RateBill:
    """Counts every release at one rate: for a loader whose batches nothing announces, such as a process's share."""

    def __init__(self, accountant: Callable[[], Any], sample_rate: float) -> None:
        self._accountant = accountant
        self._rate = sample_rate
        self._backwards = 0

    def clipped(self, examples: Any) -> None:
        """Takes note of backwards that were added to the sum."""
        self._backwards += len(examples)

    def begin(self, noise_multiplier: float, policy: Any) -> None:
        """Counts the release of the sum; one of several batches as one that nothing amplifies."""
        backwards, self._backwards = max(1, self._backwards), 0
        rate = self._rate if backwards == 1 else 1.0
        self._accountant().step(noise_multiplier=noise_multiplier / backwards, sample_rate=rate)
