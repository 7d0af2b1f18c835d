"""When a check is repeated: after a public schedule, which counts calls and knows nothing of the data."""

from __future__ import annotations

__all__ = ["Schedule"]

_SPARSEST = 1024
"""How many calls pass between two checks at most."""


class Schedule:
    """The 1st, 8th, 64th and 512th call, and then one after every 1024."""

    def __init__(self) -> None:
        self._calls = 0
        self._next = 1

    def counts(self) -> bool:
        """Counts one more call, and returns whether it is on the schedule."""
        self._calls += 1
        if self._calls < self._next:
            return False
        self._next = min(8 * self._next, self._next + _SPARSEST)
        return True
