"""Rows of one owner put next to each other, so that from there on an owner is what an example is elsewhere.

A user has several records in a batch, anywhere in it, and each user another number. The uses of the batch are put in
the order of the users, and filled up with rows of zeros, which add nothing, so that each user has as many rows. Then a
user's gradient is the sum over the rows that lie together. Operations that take any number of positions see these rows
as further positions of one sequence, so that the norm of the sum needs no gradient to be formed; its cross terms are
those between positions.

Axes: R rows (records), U owners (users), L rows of the owner that has most.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from privet.gradients.use import Owner, Recorded, Use

__all__ = ["by_owner", "ranks_among"]


def by_owner(recorded: Recorded, owner: Owner) -> Recorded:
    """Returns what was recorded with the rows by owner: as it is where row i is that of owner i."""
    if owner.index is None or not owner.units:
        return recorded
    places, empty = _places(owner.index, owner.units)
    records = len(owner.index)

    def moved(use: Use) -> Use:
        each = use.rows // max(records, 1)  # rows of one record, which lie together
        steps = torch.arange(each, device=places.device)
        chosen = use.selected((places.unsqueeze(1) * each + steps).flatten())
        chosen = chosen if empty is None else chosen.masked(empty.repeat_interleave(each))
        if not use.operation.sequences:
            return chosen
        data = tuple(None if t is None else t.view(owner.units, -1, *t.shape[1:]) for t in chosen.data)
        gradient = chosen.gradient.view(owner.units, -1, *chosen.gradient.shape[1:])
        return replace(chosen, data=data, gradient=gradient)

    return Recorded(
        recorded.examples,
        {name: [moved(use) for use in uses] for name, uses in recorded.direct.items()},
        {derivation: [moved(use) for use in uses] for derivation, uses in recorded.derived.items()},
    )


def ranks_among(owner: Tensor) -> tuple[Tensor, int]:  # (R,) whole numbers -> (R,), L
    """Returns which of its owner's rows each row is, in order, and how many the owner with most of them has."""
    rows = owner.shape[0]
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(owner)
    ranks[order] = torch.arange(rows, device=owner.device) - starts[owner[order]]
    return ranks, int(counts.max()) if rows else 0


def _places(owner: Tensor, units: int) -> tuple[Tensor, Tensor | None]:  # -> (U L,), (U L,) bool
    """Returns the row that comes to each place by owner, and which places have none; None if all have one."""
    ranks, length = ranks_among(owner)
    length = max(length, 1)
    places = owner.new_full((units * length,), -1)
    places[owner * length + ranks] = torch.arange(owner.shape[0], device=owner.device)
    empty = places < 0
    return places.clamp(min=0), empty if bool(empty.any()) else None
