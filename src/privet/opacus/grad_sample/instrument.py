"""The core's instrument, for scripts that run forwards in train mode and never their backward."""

from __future__ import annotations

from privet.gradients.capture.instrument import Instrument

__all__ = ["ForgivingInstrument"]


class ForgivingInstrument(Instrument):
    """Gives up a forward that had no backward when one of another batch comes, where the core's refuses the second.

    A backward through the forward that was given up raises: nothing of it ever reaches a parameter.
    """

    def _begin(self, members: int, examples: int) -> None:
        cycle = self.capture.cycle
        if cycle is not None and not cycle.queued and cycle.members != members:
            self.capture.release()
        super()._begin(members, examples)
