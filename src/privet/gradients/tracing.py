"""Whether what runs now is being written down as a graph: then nothing in Python may depend on values.

Every shortcut that looks at values asks here, and takes the way that is right for all of them instead: what it would
skip for an ordinary batch is done for every batch. A graph serves batches that nobody has seen yet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["traced", "tracing"]

_lock = threading.Lock()
_depth = 0  # for all threads, as a backward may run in another: at worst a shortcut is not taken


def tracing() -> bool:
    """Returns whether a graph is being traced."""
    return _depth > 0


@contextmanager
def traced() -> Iterator[None]:
    """Says so while it lasts."""
    global _depth  # noqa: PLW0603 - one fact for the whole process
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
