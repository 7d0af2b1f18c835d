"""What one forward and its backward share, as one value.

A cycle begins with a forward, is over with its backward, and is closed then. Forwards that share a backward share the
cycle. Every captured operation holds the cycle of its forward, so a backward that comes too late finds a closed one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from privet.batches.graphs import RowsTold
from privet.errors import ProtocolError
from privet.gradients.capture.routing import Routed
from privet.gradients.layout import DoubtError, Told, Trace
from privet.gradients.use import UseSink

__all__ = ["Cycle"]


@dataclass(eq=False)
class Cycle:
    """One forward, or several of the same examples, and the backward that they share.

    What happens to it, in order:

        step                          running   queued   sink
        a forward begins              1         False    given
        the forward ends              0         False    given
        the backward begins           0         True     given
        the backward is over          0         True     None: closed

    A forward or a backward that breaks off leaves the cycle as it was then. The next forward finds it running or
    queued, and closes it.

    When a forward meets an operation whose rows have no certain owner, it is in doubt: nothing of it is captured from
    there on, it ends as an ordinary forward, and is dropped. It is run anew once its batch was looked at.
    """

    examples: int
    sink: UseSink | None  # None once the cycle is closed
    made_up: bool = False  # whether the examples stand in for none, and have no part in the sum
    last: bool = True  # whether the next backward is the last one of these forwards
    trace: Trace | None = None  # where examples were found, while layouts are learned
    rows: list[RowsTold] = field(default_factory=list)  # whose rows tensors have, as the inputs tell
    doubt: DoubtError | None = None  # why the forward that runs now is not captured to its end
    told: list[Told] = field(default_factory=list)  # what was learned of this very batch, by forward
    telling: bool = False  # whether the forward that runs now follows the last of `told`
    running: int = 1  # forwards that have begun and not ended
    queued: bool = False  # whether autograd will call back at the end of the backward that runs now
    owned: dict[Any, list[Routed]] = field(default_factory=dict)  # what rows had owners of their own, by site and shape
    opaque: list[frozenset[int]] = field(default_factory=list)
    """The parameters of the modules that are one operation each, by their ids, while these modules run."""

    @property
    def members(self) -> int:
        """Returns how many examples of the batch take part: none if the only one was made up."""
        return 0 if self.made_up else self.examples

    def close(self) -> None:
        """Forgets the sink, after which no use is accepted.

        What a sink recorded holds the autograd graph, and the graph holds this cycle. Python cannot collect a ring that
        runs through autograd, so it is broken here.
        """
        self.sink = None

    def require_backward(self) -> UseSink:
        """Returns the sink, and raises if no backward of this cycle is expected now."""
        if self.sink is None:
            raise ProtocolError(
                "backward ran again, or late, through a forward whose gradient was taken, or given up, before. "
                "Expected one backward for each forward: add the losses and call backward once, without retain_graph."
            )
        if self.running:
            raise ProtocolError(
                "a backward came before the private model's forward had ended: from inside of the forward, or after a "
                "forward that was interrupted. Expected the forward to end first. Run the model anew, then backward. "
                "(A gradient that is a part of the loss is taken with respect to data or activations, not parameters: "
                "torch.autograd.grad(y, x, create_graph=True).)"
            )
        return self.sink
