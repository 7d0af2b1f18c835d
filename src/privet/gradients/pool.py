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

__all__ = ["free_idle", "scratch"]

_LEAST_BYTES = 2**18
"""Smaller tensors come from the C library's own free lists, without page faults."""

_KEPT_BYTES = 768 * 2**20
"""Idle buffers above this many bytes in all are let go of, the longest idle first."""

_lock = threading.Lock()
_buffers: list[Tensor] = []  # flat, bytes, most recently used last


def _holders(buffer: Tensor) -> int:
    return int(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata))  # noqa: SLF001 - there is no public count of who holds a storage


_ALONE = _holders(torch.empty(1, dtype=torch.uint8))


def scratch(shape: Sequence[int], like: Tensor) -> Tensor:
    """Returns uninitialised memory of a shape, with the type and device of `like`."""
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _LEAST_BYTES:  # elsewhere torch's own allocator keeps what is freed
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    with _lock:
        fits = [i for i, b in enumerate(_buffers) if size <= len(b) <= 2 * size and _holders(b) == _ALONE]
        if fits:
            buffer = _buffers.pop(min(fits, key=lambda i: len(_buffers[i])))
        else:
            buffer = torch.empty(size + size // 8 // 64 * 64, dtype=torch.uint8)  # batches of random size vary a little
        _buffers.append(buffer)
        _trim()
        return buffer[:size].view(like.dtype).view(tuple(shape))


def free_idle() -> None:
    """Lets go of every buffer that nobody holds, for those to whom memory matters more than time."""
    with _lock:
        _buffers[:] = [b for b in _buffers if _holders(b) != _ALONE]


def _trim() -> None:
    total = sum(len(b) for b in _buffers)
    for buffer in _buffers[:-1]:
        if total <= _KEPT_BYTES:
            return
        if _holders(buffer) == _ALONE:
            total -= len(buffer)
            _buffers[:] = [b for b in _buffers if b is not buffer]
