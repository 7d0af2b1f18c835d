"""By which tensors a batch is known again: its own ones and their views, as long as they live.

A batch that was moved to another device, or augmented, is in new tensors and is not recognized. So recognition may
only ever make a bill more exact, and what cannot be recognized is billed by what is true in every case.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import islice
from typing import Any, final

from torch import Tensor

from privet.batches.tree import tensors_in

__all__ = ["Leaves", "places_of"]

Place = tuple[object, int]
_MOST = 16
"""How many tensors of a batch are looked at: each example may be a tensor of its own, and a few tell the batch."""


@final
class Leaves:
    """The tensors of a batch, which are not kept alive.

    Args:
        batch: the batch, in any container.

    Attributes:
        places: where their memory lies.
    """

    def __init__(self, batch: Any) -> None:
        tensors = list(islice(tensors_in(batch), _MOST))
        self._tensors = [weakref.ref(t) for t in tensors]
        self.places = frozenset(places_of(tensors))

    @property
    def places_now(self) -> set[Place]:
        """Returns where the memory lies of those tensors that still live. Of the others it may be another's by now."""
        return set(places_of(t for t in (reference() for reference in self._tensors) if t is not None))


def places_of(tensors: Iterable[Tensor]) -> list[Place]:
    """Returns the devices and addresses of the tensors' memory, of those that have some of their own."""
    found: list[Place] = []
    for tensor in tensors:
        try:
            address = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # sparse, meta and the like
            continue
        if address:
            found.append((tensor.device, address))
    return found
