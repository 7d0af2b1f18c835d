"""How an error is recognised that says that memory ran out."""

from __future__ import annotations

import torch

from privet.errors import OutOfMemoryError

__all__ = ["is_out_of_memory"]

_SIGNS = ("out of memory", "not enough memory", "cannot allocate memory", "can't allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, on whatever device."""
    if isinstance(error, OutOfMemoryError):
        return False  # it was said already that no smaller batch helps
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
