"""By which tensors a batch is known again: its own ones and their views, as long as they live.

A batch that was moved to another device, or augmented, is in new tensors and is not recognized. So recognition may
only ever make a bill more exact, and what cannot be recognized is billed by what is true in every case. Where rows
belong to users, it has to be certain which batch this is and that its rows are in order. There a batch is known again
by its contents too, so that it may be moved.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor

from privet.batches.tree import tensors_in

__all__ = ["Leaves", "places_of", "signatures_of"]

Place = tuple[object, int]
_MOST = 16
"""How many tensors of a batch are looked at: each example may be a tensor of its own, and a few tell the batch."""


@final
class Leaves:
    """The tensors of a batch, which are not kept alive.

    Args:
        batch: the batch, in any container.
        rows: its number of examples, if its contents are to be known again; None if they need not be.

    Attributes:
        places: where their memory lies.
        signatures: of their contents.
        kinds: their types and shapes, where their contents are known.
    """

    def __init__(self, batch: Any, *, rows: int | None = None) -> None:
        tensors = list(islice(tensors_in(batch), _MOST))
        self._tensors = [weakref.ref(t) for t in tensors]
        self.places = frozenset(places_of(tensors))
        self.signatures = frozenset() if rows is None else signatures_of(tensors, rows)
        self.kinds = frozenset() if rows is None else frozenset((t.dtype, t.shape) for t in tensors)

    @property
    def places_now(self) -> set[Place]:
        """Returns where the memory lies of those tensors that still live. Of the others it may be another's by now."""
        return set(places_of(t for t in (reference() for reference in self._tensors) if t is not None))

    def changed(self, tensors: Iterable[Tensor], rows: int) -> bool:
        """Returns whether a tensor stands in the place of one of the batch, with other contents or another order."""
        alike = [t for t in tensors if (t.dtype, t.shape) in self.kinds and self.places_now.isdisjoint(places_of([t]))]
        return not signatures_of(alike, rows) <= self.signatures


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


def signatures_of(tensors: Iterable[Tensor], rows: int) -> frozenset[bytes]:
    """Returns digests of the contents of those tensors that tell in which order the rows of a batch are.

    A tensor whose rows are all equal tells nothing. A copy on another device, of the same type, has the same digest.
    """
    found = set()
    for t in tensors:
        axes = [axis for axis in range(min(t.dim(), 2)) if t.shape[axis] == rows]
        if not axes or t.layout is not torch.strided or not t.numel():
            continue
        if rows > 1 and bool((t == t.narrow(axes[0], 0, 1)).all()):
            continue
        contents = t.detach().cpu().contiguous().view(torch.uint8).numpy().data
        kind = f"{t.dtype} {tuple(t.shape)}".encode()[:64]
        found.add(hashlib.blake2b(contents, key=kind, digest_size=32).digest())
    return frozenset(found)
