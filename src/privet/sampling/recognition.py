"""By which tensors a batch is known again: its own ones and their views, as long as they live.

A batch that was moved to another device, or augmented, is in new tensors and is not recognized. So recognition may
only ever make a bill more exact, and what cannot be recognized is billed by what is true in every case.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, final

from torch import Tensor

from privet.batches.tree import tensors_in

__all__ = ["Leaves"]


@final
class Leaves:
    """The tensors of a batch, which are not kept alive.

    Args:
        batch: the batch, in any container.
    """

    def __init__(self, batch: Any) -> None:
        self._tensors = [weakref.ref(t) for t in tensors_in(batch)]

    def among(self, tensors: Iterable[Tensor]) -> bool:
        """Returns whether one of the tensors is one of the batch's, or shares its memory."""
        own = [t for t in (reference() for reference in self._tensors) if t is not None]
        places = {place for place in map(_place, own) if place is not None}
        return any(any(t is mine for mine in own) or _place(t) in places for t in tensors)


def _place(tensor: Tensor) -> tuple[object, int] | None:
    """Returns the device and address of a tensor's memory, or None if it has none of its own."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, meta and the like
        return None
    return (tensor.device, address) if address else None
