"""The clipped sum of one logical batch that the loader hands over in k parts, with one step after the k-th backward.

The loop is the one that people write, `(loss / k).backward()` on each batch, and `step()` and `zero_grad()` on every
k-th. Batches may be read ahead. So the parts wait here in order, and each backward takes the oldest:

    what happens                                        result
    a backward on the oldest part that waits            its sum is added to those of the parts before
    a backward on a later part, or on one that was      refused: a part was left out, or an example would be in the
      trained on, known by its tensors                    sum twice
    a backward on new tensors, while several parts of   taken for the oldest of them; the step is in doubt, as one on
      its size wait                                       a batch that was read ahead (`Billing`)
    a backward on another number of rows                refused: rows are not the examples of that part
    a backward after the k-th, before the step          refused: the step came too late
    a step before the k-th backward                     refused: it came too early
    `zero_grad()` between the first backward and step   refused: it would throw the sum away
    a new pass, while the old one was left early        what was gathered of that is forgotten, and not billed
"""

from __future__ import annotations

from collections import deque

from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.sampling.base import BatchTicket
from privet.training.handed_over import Match

__all__ = ["AccumulatedSum"]


class AccumulatedSum:
    """Gathers the sums of k parts, and knows whether they are the whole of one logical batch.

    Args:
        parts: how many there are, k.
    """

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self._waiting: deque[BatchTicket] = deque()  # handed over, and not trained on yet
        self._taken: list[BatchTicket] = []  # trained on, of the logical batch at hand
        self._doubted: list[BatchTicket] = []  # what a backward of this logical batch may have been on instead
        self._gathered: ClippedSum | None = None
        self._last: BatchTicket | None = None  # handed over last
        self._trained: tuple[int, int] | None = None  # the pass of the last part that was trained on

    # -- what is known of the batch ----------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Returns whether the sum of a backward waits for its step."""
        return bool(self._taken)

    @property
    def begun(self) -> bool:
        """Returns the same: a sum is here from the first part on."""
        return self.pending

    @property
    def unfinished(self) -> bool:
        """Returns whether a logical step is under way, of which parts are still to be trained on."""
        return self.pending and not self._complete

    @property
    def _complete(self) -> bool:
        return len(self._taken) == self._parts

    def match(self) -> Match | None:
        """Returns which batch the sum is of, if it is of all of it, and all parts that it may be of."""
        return Match(self._taken[-1], (self._taken[-1], *self._doubted)) if self._complete else None

    @property
    def parts_of(self) -> BatchTicket | None:
        """Returns the ticket of the batch that the sum holds parts of."""
        return self._taken[-1] if self._taken else None

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the parameters that the sum is of, in the order of their names."""
        return () if self._gathered is None else tuple(sorted(self._gathered.values))

    # -- what happens to it ------------------------------------------------------------------------------------------

    def announce(self, ticket: BatchTicket) -> None:
        """Takes note of a part that the private loader is about to hand over."""
        before, self._last = self._last, ticket
        if before is not None and before.pass_key != ticket.pass_key:
            # A pass that was handed over to its end may still be trained on, by a loop that reads ahead over the end.
            ahead = before.ends_pass and before.last and self._trained == before.pass_key
            if not ahead:
                self._waiting.clear()
                if self.unfinished:
                    self.discard()
        self._waiting.append(ticket)

    def receive(self, clipped: ClippedSum, *, examples: int, known: BatchTicket | None) -> None:
        """Takes the sum of one backward.

        Args:
            clipped: the sum.
            examples: its rows.
            known: the part whose tensors the model was given, if that was seen.

        Raises:
            ProtocolError: if it is not the next part of the logical batch at hand.
        """
        self.refuse_second()
        ticket = self._next(examples, known)
        before, self._gathered = self._gathered, None
        taken, self._taken = self._taken, []
        # If adding them fails midway, all of them are forgotten: nothing of the logical batch is released.
        self._gathered = clipped if before is None else before.add(clipped)
        self._taken = [*taken, ticket]

    def _next(self, examples: int, known: BatchTicket | None) -> BatchTicket:
        """Returns the part that a backward is on, which waits no longer."""
        place = len(self._taken) + 1
        oldest = self._waiting[0] if self._waiting else None
        if oldest is None or (known is not None and all(known is not each for each in self._waiting)):
            raise ProtocolError(
                f"a backward came on a batch that the private loader did not hand over, or that was trained on "
                f"already: an example could be in the sum twice. Expected one forward and one backward on each batch "
                f"of the loader that make_private returned, with accumulate={self._parts}."
            )
        if (known is not None and known is not oldest) or oldest.first != (place == 1):
            raise ProtocolError(
                f"a batch was left out before backward {place} of {self._parts}, or an error was caught on it. "
                f"Expected a backward on each of the {self._parts} parts of a logical batch, one that is empty "
                "included. To leave examples out, give them a loss of zero. Begin again with a new pass."
            )
        if oldest.size != examples:
            raise ProtocolError(
                f"a backward ran on {examples} rows, and the next part that the private loader handed over has "
                f"{oldest.size} examples. Expected one row for each example, and a backward on each part in turn. "
                "For several views use privet.Augmented (a forward for each, then one backward); to leave examples "
                "out, give them a loss of zero. Nothing was released."
            )
        if known is None and examples:
            self._doubted += [each for each in list(self._waiting)[1:] if each.size == examples]
        self._trained = oldest.pass_key
        return self._waiting.popleft()

    def refuse_second(self) -> None:
        """Raises if all parts are here, and their step is due."""
        if self._complete:
            raise ProtocolError(
                f"a further backward came after the {self._parts} of a logical batch, before the optimizer's step. "
                f"Expected optimizer.step() after every {self._parts}th backward. Write, with the batches counted from "
                f"0: if (i + 1) % {self._parts} == 0: optimizer.step(); optimizer.zero_grad()"
            )

    def accumulate(self) -> None:
        """Raises: parts are added up after each backward, and no step stands between them."""
        raise ProtocolError(
            f"a step that only accumulates was taken with accumulate={self._parts}, which needs none. Expected one "
            "step after the last part of a logical batch."
        )

    def refuse_zero_grad(self) -> None:
        """Raises if the sum would be thrown away."""
        if self.pending:
            raise ProtocolError(
                f"zero_grad() after backward {len(self._taken)} of {self._parts} throws away what was accumulated. "
                f"Expected it after the step, once in {self._parts} batches. Write, with the batches counted from 0: "
                f"if (i + 1) % {self._parts} == 0: optimizer.step(); optimizer.zero_grad()"
            )

    def take(self) -> ClippedSum:
        """Returns the sum of the logical batch, and forgets it."""
        total = self._gathered
        assert total is not None
        self.discard()
        return total

    def require(self) -> None:
        """Raises unless there is a sum to release, of all parts of a logical batch."""
        if not self._complete:
            found = f"backward {len(self._taken)} of {self._parts}" if self._taken else "no backward since the last one"
            raise ProtocolError(
                f"optimizer.step() came after {found}. Expected it after every {self._parts}th backward, since "
                f"accumulate={self._parts} was given to make_private: a part of a logical batch cannot be released "
                f"alone. Write, with the batches counted from 0: if (i + 1) % {self._parts} == 0: optimizer.step(); "
                f"optimizer.zero_grad(). In a trainer, set its own accumulation to {self._parts}; a pass has a multiple"
                " of that many batches."
            )

    # -- what is given up --------------------------------------------------------------------------------------------

    def retract(self) -> bool:
        """Returns False: a part comes once."""
        return False

    def discard(self) -> None:
        """Forgets what was gathered; nothing of it was released."""
        self._taken, self._doubted, self._gathered = [], [], None

    def forget(self) -> None:
        """Forgets everything that was handed over: no step is taken on it any more."""
        self.discard()
        self._waiting.clear()
        self._last = self._trained = None
