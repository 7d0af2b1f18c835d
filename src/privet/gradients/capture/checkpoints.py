"""Reentrant checkpoints of a private forward run as the other kind, which has the same results.

`torch.utils.checkpoint.checkpoint(..., use_reentrant=True)` runs a part without gradients, and in the backward anew,
inside of a backward of its own. What was made of parameters alone outside of the part, such as a table of relative
positions, is cut off from there; and rows that an expert met cannot be followed to where they are computed again. With
`use_reentrant=False` the same part is computed again without being cut off. So while a private forward runs in a
thread, a reentrant checkpoint in that thread is one that is not; so is one inside of it when the backward computes it
again. A part none of whose arguments needs a gradient gets none from torch, and stays as it is.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import checkpoint as checkpoints

from privet.gradients.tracing import tracing

__all__ = ["not_reentrant"]

_REENTRANT: Any = checkpoints.CheckpointFunction
_threads: WeakKeyDictionary[object, int] = WeakKeyDictionary()
"""In which thread each private forward runs; 0 where its backward is still to come."""


class _Checkpoint(checkpoints.CheckpointFunction):
    """What torch finds in place of its own autograd Function while a private forward runs."""

    @classmethod
    def apply(cls, function: Any, preserve_rng_state: Any, *args: Any) -> Any:
        """Returns what the function returns, and has it computed again in the backward."""
        again = torch._C._current_graph_task_id() != -1  # noqa: SLF001 - there is no public way to ask
        here = threading.get_ident() in list(_threads.values()) or (again and 0 in list(_threads.values()))
        needed = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if not (here and needed and torch.is_grad_enabled()) or tracing():
            return _REENTRANT.apply(function, preserve_rng_state, *args)
        return checkpoints.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def not_reentrant(who: object, thread: int | None) -> None:
    """Has reentrant checkpoints in a thread run as the other kind, until it is called with None.

    Args:
        who: watches a forward.
        thread: in which the forward runs, 0 when it is over, or None when its backward is over, too.
    """
    if thread is None:
        _threads.pop(who, None)
    else:
        _threads[who] = thread
    found: Any = _Checkpoint if _threads else _REENTRANT
    if checkpoints.CheckpointFunction in (_Checkpoint, _REENTRANT):  # another library's own stays
        checkpoints.CheckpointFunction = found  # type: ignore[misc]
