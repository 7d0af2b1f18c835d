"""The clipped sum of one logical batch while its physical batches arrive, and whether these are all of it.

It is secret, and held by the update alone. A logical batch that came in one piece is the case of one part.

    what happens                                        result
    a backward while another's sum waits                refused
    a part of another size than was announced           refused: an example might be in the sum twice
    a second backward on one part                       refused, for the same reason
    a part on which no step was taken                   its examples count as absent; the batch is not called sampled
    a new logical batch before the last one was whole   what was gathered of that is forgotten
    a batch that no loader announced                    a sum of its own, not called sampled

A batch in one piece has its part from its backward on, for it may have been read ahead: which batch a backward is on
is found by `HandedOver`. Physical batches are handed over one by one, each just before its backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.sampling.base import BatchTicket
from privet.training.handed_over import Match

__all__ = ["LogicalSum", "thrown_away"]


@dataclass(eq=False)
class _Part:
    """A physical batch: its ticket if a loader announced it, and its sum from its backward until its step."""

    ticket: BatchTicket | None
    match: Match | None = None  # of a batch in one piece
    summed: ClippedSum | None = None
    sampled: bool = False  # whether its backward was on as many examples as were announced
    stepped: bool = False  # whether its sum was added to those of the parts before


def thrown_away() -> ProtocolError:
    """Returns the error of a `zero_grad()` between backward and step."""
    return ProtocolError(
        "zero_grad() between backward and step throws the gradient away, after it was computed from data. "
        "Expected zero_grad() before backward, or after step. A backward that is not trained on, such as the "
        "search for adversarial inputs, belongs in eval(); a discriminator that the generator trains through "
        "is held fixed with eval() and requires_grad_(False)."
    )


class LogicalSum:
    """Gathers the sums of physical batches until the last one of their logical batch.

    All that is known of the batch is read from the list of its parts. The sums of parts whose step was taken are added
    up at once, so that no more than two sums are in memory.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._gathered: ClippedSum | None = None  # the sum of all parts whose step was taken
        self._at_hand: BatchTicket | None = None  # what was handed over last

    # -- what is known of the batch ----------------------------------------------------------------------------------

    @property
    def _current(self) -> _Part | None:
        """Returns the part that was handed over last, if its step was not taken yet."""
        return self._parts[-1] if self._parts and not self._parts[-1].stepped else None

    @property
    def pending(self) -> bool:
        """Returns whether the sum of a backward waits for its step."""
        return any(part.summed is not None for part in self._parts)

    @property
    def begun(self) -> bool:
        """Returns whether a logical step is under way: something was summed and not yet released."""
        return self.pending or self._gathered is not None

    @property
    def unfinished(self) -> bool:
        """Returns whether parts of the logical batch are still to be handed over."""
        return self._at_hand is not None and not self._at_hand.last

    @property
    def physical(self) -> bool:
        """Returns whether what was handed over last is a part of a logical batch."""
        return self._at_hand is not None and not self._at_hand.whole

    def match(self) -> Match | None:
        """Returns which batch the sum is of, if that was sampled, and the sum is of all of it and of nothing else."""
        last = self._parts[-1] if self._parts else None
        if last is None or last.stepped or last.ticket is None:
            return None
        if len(self._parts) == 1 and last.ticket.whole:
            return last.match
        parts = [part for part in self._parts if part.ticket is not None and part.ticket.of_same_batch(last.ticket)]
        first = parts[0].ticket
        if len(parts) < len(self._parts) or first is None or not first.first or not last.ticket.last:
            return None
        whole = all(part.sampled and (part.stepped or part is last) for part in parts)
        return Match.certain(last.ticket) if whole else None

    @property
    def parts_of(self) -> BatchTicket | None:
        """Returns the ticket of the batch that the sum holds parts of, if a loader handed it over."""
        return next((part.ticket for part in reversed(self._parts) if part.ticket is not None), None)

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the parameters that the sum which waits is of, in the order of their names."""
        return tuple(sorted(name for part in self._parts if part.summed for name in part.summed.values))

    # -- what happens to it ------------------------------------------------------------------------------------------

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a batch that the private loader is about to hand over."""
        before, self._at_hand = self._at_hand, ticket
        if before is not None and before.of_same_batch(ticket) and not ticket.first:
            self._parts.append(_Part(ticket))
            return
        # A sum that waits stays, although its batch is given up: to lose it without a word would hide a mistake in the
        # loop, such as gradients that are accumulated over batches. The next backward or step finds it and says so.
        waiting = [part for part in self._parts if part.summed is not None]
        self._parts, self._gathered = [*waiting, *([] if ticket.whole else [_Part(ticket)])], None

    def refuse_second(self) -> None:
        """Raises if the sum of another backward still waits."""
        if self.pending:
            raise ProtocolError(
                "a second backward came before the optimizer's step. Expected one backward for each step: add the "
                "losses and call backward once. To accumulate gradients over k batches, keep your loop and declare k:\n"
                "    engine.make_private(..., accumulate=k)\n"
                "To cut a batch that is too large for memory, step after each physical batch of\n"
                "    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=m, optimizer=optimizer) as "
                "loader:\n"
                "A backward that only looks for adversarial inputs belongs in eval()."
            )

    def refuse_zero_grad(self) -> None:
        """Raises if a gradient would be thrown away between backward and step."""
        if self.pending:
            raise thrown_away()

    def receive(self, clipped: ClippedSum, *, examples: int, match: Match | None) -> None:
        """Takes the sum of one backward.

        Args:
            clipped: the sum.
            examples: its rows.
            match: the batch in one piece that it is of; None for physical batches and those of the user's own.

        Raises:
            ProtocolError: if another sum still waits, or this is not the sum of the part that was handed over.
        """
        self.refuse_second()
        if not self.physical:
            self._parts = [_Part(None if match is None else match.ticket, match, clipped, sampled=True)]
            return
        part, ticket = self._current, self._at_hand
        assert ticket is not None
        if part is None or part.ticket is None or part.ticket.size != examples:
            found = "a second backward on it" if part is None else f"a backward on {examples} examples"
            raise ProtocolError(
                f"a physical batch of {ticket.size} examples got {found}: an example could be in the sum twice. "
                "Expected one forward, backward and step on each physical batch, just as it was handed over."
            )
        part.summed, part.sampled = clipped, True

    def accumulate(self) -> None:
        """Adds the sum that waits to those of the parts before; nothing is released.

        Raises:
            ProtocolError: if no sum waits, or it is of another logical batch than the one at hand.
        """
        ticket, at_hand = self._waiting().ticket, self._at_hand
        if at_hand is None or ticket is None or not ticket.of_same_batch(at_hand):
            raise ProtocolError(
                "the sum that waits is of an earlier batch than the physical batch at hand: added up, an example of "
                "both would count twice. Expected the step of each batch before the next one is handed over. Call "
                "optimizer.step() right after backward."
            )
        self._gathered = self._total()

    def take(self) -> ClippedSum:
        """Returns the sum of the logical batch, and forgets it."""
        total = self._total()
        self.forget()
        return total

    def require(self) -> None:
        """Raises unless there is a sum to release, of a logical batch of which nothing is still to come."""
        if self.unfinished:
            raise ProtocolError(
                "optimizer.step() would release a logical batch of which physical batches are still to come. Expected "
                "the step of the optimizer that BatchMemoryManager was given, inside of its `with` block."
            )
        self._waiting()

    def _waiting(self) -> _Part:
        for part in self._parts:
            if part.summed is not None:
                return part
        raise ProtocolError(
            "optimizer.step() without a private gradient: there was no backward since the last step. Expected "
            "forward, loss.backward(), then one optimizer.step(), with the model in train() mode."
        )

    def _total(self) -> ClippedSum:
        """Returns all sums so far. If adding them fails midway, the part counts as trained on and is not repeated."""
        part, before = self._waiting(), self._gathered
        last, part.summed, self._gathered = part.summed, None, None
        assert last is not None
        sampled, part.sampled, part.stepped = part.sampled, False, True  # until they are added, nothing is whole
        total = last if before is None else before.add(last)
        part.sampled = sampled
        return total

    # -- what is given up --------------------------------------------------------------------------------------------

    def retract(self) -> bool:
        """Forgets the part that was handed over last. Returns whether it has left nothing, and may come again."""
        if self._at_hand is None:
            return False
        if self._at_hand.whole:
            self._parts = []
            return True
        part = self._current
        if part is None or part.ticket is None:
            return False
        self._parts.pop()
        return True

    def discard(self) -> None:
        """Forgets the sum of the last backward, and lets its part be trained on again: nothing of it was released."""
        for part in self._parts:
            part.summed, part.sampled = None, part.sampled and part.stepped
        self._parts = [part for part in self._parts if part.ticket is not None and not part.ticket.whole]

    def forget(self) -> None:
        """Forgets everything of the logical batch at hand: no step is taken on it any more."""
        self._parts, self._gathered, self._at_hand = [], None, None
