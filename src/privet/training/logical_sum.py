"""The clipped sum of one logical batch while its physical batches arrive, and whether these are all of it.

It is secret, and held by the update alone. A logical batch that came in one piece is the case of one part.

    what happens                                        result
    a backward while another's sum waits                refused
    a part of another size than was announced           refused: an example might be in the sum twice
    a second backward on one part                       refused, for the same reason
    a part on which no step was taken                   its examples count as absent; the batch is not called sampled
    a new logical batch before the last one was whole   what was gathered of that is forgotten
    a batch that no loader announced                    a sum of its own, not called sampled
"""

from __future__ import annotations

from dataclasses import dataclass

from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.sampling.base import BatchTicket

__all__ = ["LogicalSum"]


@dataclass(eq=False)
class _Part:
    """A physical batch: its ticket if a loader announced it, and its sum from its backward until its step."""

    ticket: BatchTicket | None
    summed: ClippedSum | None = None
    sampled: bool = False  # whether its backward was on as many examples as were announced
    stepped: bool = False  # whether its sum was added to those of the parts before


class LogicalSum:
    """Gathers the sums of physical batches until the last one of their logical batch.

    All that is known of the batch is read from the list of its parts. The sums of parts whose step was taken are added
    up at once, so that no more than two sums are in memory.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._gathered: ClippedSum | None = None  # the sum of all parts whose step was taken

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
        ticket = self._parts[-1].ticket if self._parts else None
        return ticket is not None and not ticket.last

    def ticket(self) -> BatchTicket | None:
        """Returns the ticket of the batch if it was sampled, and its sum is of all of it and of nothing else."""
        first = self._parts[0].ticket if self._parts else None
        last = self._current
        if first is None or not first.first or last is None or last.ticket is None or not last.ticket.last:
            return None
        whole = all(part.sampled and (part.stepped or part is last) for part in self._parts)
        return last.ticket if whole else None

    # -- what happens to it ------------------------------------------------------------------------------------------

    def announce(self, ticket: BatchTicket) -> BatchTicket | None:
        """Takes note of a batch that the private loader is about to hand over.

        Returns the ticket of the logical batch before it, if that is given up for it: no step was taken on it.
        """
        before = self._parts[-1].ticket if self._parts else None
        if before is not None and before.of_same_batch(ticket) and not ticket.first:
            self._parts.append(_Part(ticket))
            return None
        # A sum that waits stays, although its batch is given up: to lose it without a word would hide a mistake in the
        # loop, such as gradients that are accumulated over batches. The next backward or step finds it and says so.
        waiting = [part for part in self._parts if part.summed is not None]
        self._parts, self._gathered = [*waiting, _Part(ticket)], None
        return before

    def receive(self, clipped: ClippedSum, *, examples: int) -> None:
        """Takes the sum of one backward.

        Raises:
            ProtocolError: if another sum still waits, or this is not the sum of the part that was handed over.
        """
        if self.pending:
            raise ProtocolError(
                "a second backward came before the optimizer's step. Expected one backward for each step: add the "
                "losses and call backward once, or use virtual steps to accumulate physical batches."
            )
        part = self._current
        sampled = part is not None and part.ticket is not None and part.ticket.size == examples
        ticket = self._parts[-1].ticket if self._parts else None
        if ticket is not None and not (ticket.first and ticket.last) and not sampled:
            found = "a second backward on it" if part is None else f"a backward on {examples} examples"
            raise ProtocolError(
                f"a physical batch of {ticket.size} examples got {found}: an example could be in the sum twice. "
                "Expected one forward, backward and step on each physical batch, just as it was handed over."
            )
        if part is None:  # a batch of the user's own
            part = _Part(None)
            self._parts.append(part)
        part.summed, part.sampled = clipped, sampled

    def accumulate(self) -> None:
        """Adds the sum that waits to those of the parts before; nothing is released.

        Raises:
            ProtocolError: if no sum waits.
        """
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
        part = self._current
        if part is None or part.ticket is None:
            return False
        self._parts.pop()
        return True

    def discard(self) -> None:
        """Forgets the sum of the last backward, and lets its part be trained on again: nothing of it was released."""
        for part in self._parts:
            part.summed, part.sampled = None, part.sampled and part.stepped
        self._parts = [part for part in self._parts if part.ticket is not None]

    def forget(self) -> BatchTicket | None:
        """Forgets everything of the logical batch. Returns its ticket if it had one, which no step was taken on."""
        ticket = self._parts[-1].ticket if self._parts else None
        self._parts, self._gathered = [], None
        return ticket
