"""Scratch memory that is used again: a fresh large tensor costs more in page faults than in arithmetic.

The C library hands large blocks back to the operating system when they are freed, which then gives each page again,
zeroed, at the first touch. A buffer from here stays mapped. It can never alias live data: a buffer is handed out again
only if nobody else holds its storage, views and saved tensors included. What a buffer held before is overwritten by
the next user, and is not readable through anything that this package returns.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from privet.gradients.tracing import tracing

__all__ = ["free_idle", "scratch"]

_LEAST_BYTES = 2**18
"""Smaller tensors come from the C library's own free lists, without page faults."""

_KEPT_BYTES = 768 * 2**20
"""Idle buffers above this many bytes in all are let go of, the longest idle first."""

_lock = threading.Lock()


class _Buffer:
    """One flat buffer, and who holds its storage."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.flat = torch.empty(size, dtype=dtype)
        self.size = size
        self.bytes = size * self.flat.element_size()
        self._storage = self.flat.untyped_storage()._cdata  # noqa: SLF001 - there is no public count of who holds one
        self._alone = self._holders()

    def _holders(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage))  # noqa: SLF001

    @property
    def idle(self) -> bool:
        """Returns whether nobody else holds the storage."""
        return self._holders() == self._alone


_buffers: list[_Buffer] = []  # most recently used last


def scratch(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns uninitialised memory of a shape, with the type and device of `like`."""
    size, dtype = math.prod(shape), like.dtype
    if not like.is_cpu or size * like.element_size() < _LEAST_BYTES or tracing():
        # Elsewhere torch's own allocator keeps what is freed.
        return torch.empty(shape, dtype=dtype, device=like.device)
    with _lock:
        fits = [b for b in _buffers if size <= b.size <= 2 * size and b.flat.dtype == dtype and b.idle]
        if fits:
            buffer = min(fits, key=lambda b: b.size)
            _buffers.remove(buffer)
        else:
            buffer = _Buffer(size + size // 8 // 64 * 64, dtype)  # batches of random size vary a little
        _buffers.append(buffer)
        _trim()
        return buffer.flat[:size].view(shape)


def free_idle() -> None:
    """Lets go of every buffer that nobody holds, for those to whom memory matters more than time."""
    with _lock:
        _buffers[:] = [b for b in _buffers if not b.idle]


def _trim() -> None:
    total = sum(b.bytes for b in _buffers)
    for buffer in _buffers[:-1]:
        if total <= _KEPT_BYTES:
            return
        if buffer.idle:
            total -= buffer.bytes
            _buffers.remove(buffer)
