"""Whether the code that runs now is being traced into a graph. Then nothing in Python may depend on values.

A graph is traced once, with one batch, and is used for all batches after it. Some code looks at the values of a batch,
and skips work that this batch does not need. Such code asks `tracing()` first. While a graph is traced, it does all of
the work, which is right for every batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["traced", "tracing"]

_lock = threading.Lock()
# One count for all threads, because a backward may run in another thread than its forward. A thread that traces nothing
# may read it as well; at worst it does work that it could have skipped.
_depth = 0


def tracing() -> bool:
    """Returns whether a graph is being traced."""
    return _depth > 0


@contextmanager
def traced() -> Iterator[None]:
    """Makes `tracing()` true inside of this context."""
    global _depth  # noqa: PLW0603 - one fact for the whole process
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
