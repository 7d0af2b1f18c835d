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

from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.sampling import BatchTicket

__all__ = ["LogicalSum"]


class LogicalSum:
    """Gathers the sums of physical batches until the last one of their logical batch."""

    def __init__(self) -> None:
        self._ticket: BatchTicket | None = None  # of the batch that was handed over and not yet trained on
        self._pending: ClippedSum | None = None  # of the last backward
        self._sampled = False  # whether that backward was on the batch of the ticket
        self._gathered: ClippedSum | None = None  # of the parts before
        self._of: BatchTicket | None = None  # a part of the logical batch that is being gathered
        self._whole = True

    @property
    def pending(self) -> bool:
        """Returns whether the sum of a backward waits for its step."""
        return self._pending is not None

    @property
    def begun(self) -> bool:
        """Returns whether a logical step is under way: something was summed and not yet released."""
        return self._pending is not None or self._gathered is not None

    @property
    def unfinished(self) -> bool:
        """Returns whether parts of the logical batch are still to be handed over."""
        return self._of is not None and not self._of.last

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a batch that the private loader is about to hand over."""
        if self._of is None or (self._of.passes, self._of.index) != (ticket.passes, ticket.index) or ticket.first:
            self._gathered, self._whole = None, ticket.first
        elif self._ticket is not None:  # no step was taken on the part before
            self._whole = False
        self._of = None if ticket.first and ticket.last else ticket
        self._ticket = ticket

    def receive(self, clipped: ClippedSum, *, examples: int) -> None:
        """Takes the sum of one backward.

        Raises:
            ProtocolError: if another sum still waits, or this is not the sum of the part that was handed over.
        """
        if self._pending is not None:
            raise ProtocolError(
                "a second backward came before the optimizer's step. Expected one backward for each step: add the "
                "losses and call backward once, or use virtual steps to accumulate physical batches."
            )
        sampled = self._ticket is not None and self._ticket.size == examples
        if self._of is not None and not sampled:
            found = "a second backward on it" if self._ticket is None else f"a backward on {examples} examples"
            raise ProtocolError(
                f"a physical batch of {self._of.size} examples got {found}: an example could be in the sum twice. "
                "Expected one forward, backward and step on each physical batch, just as it was handed over."
            )
        self._pending, self._sampled = clipped, sampled

    def accumulate(self) -> None:
        """Adds the sum that waits to those of the parts before; nothing is released.

        Raises:
            ProtocolError: if no sum waits.
        """
        self._gathered = self._total()

    def ticket(self) -> BatchTicket | None:
        """Returns the ticket of the batch if it was sampled, and its sum is of all of it and of nothing else."""
        return self._ticket if self._sampled and self._whole else None

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
        self._require_pending()

    def _require_pending(self) -> ClippedSum:
        if self._pending is None:
            raise ProtocolError(
                "optimizer.step() without a private gradient: there was no backward since the last step. Expected "
                "forward, loss.backward(), then one optimizer.step(), with the model in train() mode."
            )
        return self._pending

    def _total(self) -> ClippedSum:
        """Returns all sums so far; if adding them fails midway, the part counts as trained on and is not repeated."""
        last, before = self._require_pending(), self._gathered
        self._pending = self._gathered = self._ticket = None
        whole, self._whole = self._whole, False
        total = last if before is None else before.add(last)
        self._whole = whole
        return total

    # -- what is given up --------------------------------------------------------------------------------------------

    def retract(self) -> bool:
        """Returns whether the part that was handed over last has left nothing, and may be handed over again."""
        if self._ticket is None:
            return False
        self._pending = self._ticket = None
        return True

    def discard(self) -> None:
        """Forgets the sum of the last backward, and lets its part be trained on again: nothing of it was released."""
        self._pending, self._sampled = None, False

    def forget(self) -> None:
        """Forgets everything of the logical batch."""
        self._pending = self._gathered = self._ticket = self._of = None
        self._sampled, self._whole = False, True
