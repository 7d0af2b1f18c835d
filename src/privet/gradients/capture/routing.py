"""Rows that belong to examples by a list and not by their place: tokens that a router hands to experts.

Inside of `rows_of`, row i of a tensor of R rows belongs to example `owner[i]`. The same is known of rows that were
taken from others by an index (`owned.py`). What a parameter met there is put back in the order of the examples when
the gradient has come, each example's rows one after the other and filled up with zeros, which add nothing: from there
on they are positions like any other.

Axes: B examples, R rows, L rows of the example that has most.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from privet.errors import ConfigurationError, UnsupportedModelError
from privet.gradients.by_owner import ranks_among
from privet.gradients.layout import Site
from privet.gradients.rules.free import EXPANSIONS
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation

__all__ = ["Packing", "Routed", "require_alike", "routed_now", "rows_of"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_local = threading.local()


@dataclass(frozen=True, eq=False)
class Packing:
    """How rows were packed by time: at step t lie the first `sizes[t]` of the sequences, in their sorted order."""

    order: Routed
    """The sequences that were packed, as they were sorted."""
    sizes: tuple[int, ...]
    """How many of them each step has."""


class Routed:
    """Which example each row belongs to.

    Args:
        owner: (R,) whole numbers.
        origin: the rows that these were taken from, which may be put back there.
        by_place: whether the rows lie as those of any batch do: those of one example together, and equally many each.
        axis: the axis of the tensor that the rows lie on.
        packing: how they were packed, or None if they were not.
    """

    def __init__(
        self,
        owner: object,
        *,
        origin: Routed | None = None,
        by_place: bool = False,
        axis: int = 0,
        packing: Packing | None = None,
    ) -> None:
        if not isinstance(owner, Tensor) or owner.dim() != 1 or owner.dtype not in _WHOLE:
            found = (
                f"{owner.dtype} of shape {tuple(owner.shape)}" if isinstance(owner, Tensor) else type(owner).__name__
            )
            raise ConfigurationError(
                f"rows_of was given {found}. Expected whole numbers of shape (R,): for each row the place of its "
                "example in the batch."
            )
        if tracing():
            raise UnsupportedModelError(
                "rows_of has shapes that depend on values, which a graph cannot have. Train with compile=False."
            )
        self.owner = owner.detach().long()
        self.origin = origin
        self.by_place = by_place
        self.axis = axis
        self.packing = packing
        self.by_index = False  # whether they were taken by numbers of rows, and not by a mask or a slice
        self._fits: int | None = None  # the number of examples that the owners are known to be among

    @staticmethod
    def in_order(rows: int, examples: int, *, device: torch.device, batch_first: bool = True, axis: int = 0) -> Routed:
        """Returns the owners of rows that lie by example, as many of each; or by position, without `batch_first`."""
        owner = torch.arange(examples, device=device)
        each = rows // max(examples, 1)
        owner = owner.repeat_interleave(each) if batch_first else owner.repeat(each)
        return Routed(owner, by_place=True, axis=axis)

    def same(self, other: Routed) -> bool:
        """Returns whether both say the same of as many rows, on the same axis."""
        if self is other:
            return True
        return (self.axis, self.rows) == (other.axis, other.rows) and torch.equal(self.owner, other.owner)

    def on_axis(self, axis: int) -> Routed:
        """Returns the owners of the same rows on another axis."""
        if axis == self.axis:
            return self
        found = Routed(self.owner, origin=self.origin, by_place=self.by_place, axis=axis)
        found.by_index = self.by_index
        return found

    def taken(self, index: Tensor | slice) -> Routed:
        """Returns the owners of rows that are taken by an index, (R',) whole numbers or (R,) bool."""
        index = index.detach().to(self.owner.device) if isinstance(index, Tensor) else index
        found = Routed(self.owner[index], origin=self, axis=self.axis)
        found.by_index = isinstance(index, Tensor) and index.dtype != torch.bool
        return found

    @property
    def first_origin(self) -> Routed:
        """Returns the rows that these were taken from at first, themselves if they were not."""
        return self if self.origin is None else self.origin.first_origin

    @property
    def rows(self) -> int:
        """Returns R."""
        return self.owner.shape[0]

    def require_rows(self, site: Site, t: Tensor) -> None:
        """Raises unless `t` has a row for each owner, and has them as data.

        R is another number in every batch. Were tensors of other sizes let through as constants, one of them would be
        taken for rows in the batch in which R happens to be its size.
        """
        if t.dim() and t.shape[0] == self.rows and site.operation not in EXPANSIONS:
            return
        found = "makes rows of a parameter" if site.operation in EXPANSIONS else f"has shape {tuple(t.shape)}"
        raise UnsupportedModelError(
            f"{site} {found} inside rows_of of {self.rows} rows. Expected tensors with those rows on axis 0 wherever a "
            "parameter is met there, and no expand or repeat of parameters. Do what concerns constants and parameters "
            "alone, and other tensors, outside of rows_of; rows and parameters broadcast without expand."
        )

    def require_examples(self, examples: int) -> None:
        """Raises if a row belongs to no example of the batch."""
        if self._fits == examples:
            return
        if self.rows and not 0 <= int(self.owner.min()) <= int(self.owner.max()) < examples:
            raise ConfigurationError(
                f"rows_of was given places that are not in a batch of {examples}. Expected numbers from 0 to "
                "B - 1, counted in the batch as the model got it."
            )
        self._fits = examples

    @cached_property
    def _ranks(self) -> tuple[Tensor, int]:
        """Returns which of its example's rows each row is, and L: in packed rows, the step."""
        if self.packing is not None:
            steps = torch.tensor(self.packing.sizes, device=self.owner.device)
            return torch.arange(len(steps), device=self.owner.device).repeat_interleave(steps), len(steps)
        return ranks_among(self.owner)

    def examples_first(self, t: Tensor, examples: int) -> Tensor:  # (R, ...) -> (B, L, ...)
        """Returns the rows by example, filled up with zeros."""
        ranks, length = self._ranks
        if t.shape[0] != self.rows:
            raise UnsupportedModelError(
                f"an operation inside rows_of met {t.shape[0]} rows, and {self.rows} have an owner. Expected "
                "operations on the rows that were given one. Leave rows_of before rows are put together."
            )
        ordered = t.new_zeros(examples, length, *t.shape[1:])
        ordered[self.owner, ranks] = t
        return ordered

    def rows_first(self, t: Tensor) -> Tensor:  # (B, L, ...) -> (R, ...)
        """Returns what lies by example in the order of the rows."""
        return t[self.owner, self._ranks[0]]


@contextmanager
def rows_of(owner: Tensor) -> Iterator[None]:  # (R,) whole numbers
    """Says that row i of every tensor of R rows belongs to example `owner[i]` of the batch, inside of this context.

    For parts of a model that see rows in another order, or not all of them, such as the experts of a mixture:

        chosen = (expert == e).nonzero()[:, 0]              # of B * T tokens
        with privet.rows_of(chosen // T):
            out[chosen] = experts[e](tokens[chosen])

    The numbers come from the model, and are believed. The check on the first batch refuses wrong ones: it compares what
    they lead to with autograd's own gradients of some of the examples.

    Raises:
        ConfigurationError: if they are not whole numbers of shape (R,), or of no example.
        UnsupportedModelError: inside, for operations that do not treat all rows alike.
    """
    before = routed_now()
    _local.routed = Routed(owner)
    try:
        yield
    finally:
        _local.routed = before


def require_alike(operation: Operation, parameters: Sequence[str], routed: Routed, examples: int) -> None:
    """Raises if an operation on rows with owners does not treat all rows alike, or a row is nobody's.

    Raises:
        UnsupportedModelError: if the operation does not treat all rows alike.
        ConfigurationError: if a row belongs to no example of the batch.
    """
    if not operation.positionwise:
        raise UnsupportedModelError(
            f"{type(operation).__name__} of {', '.join(parameters)} met rows that belong to examples by a list (inside "
            "rows_of, of a packed sequence, or taken by an index). Expected operations that treat all rows alike there "
            "(linear, embedding, layer norm)."
        )
    routed.require_examples(examples)


def routed_now() -> Routed | None:
    """Returns the owners in force, in this thread."""
    found: Routed | None = getattr(_local, "routed", None)
    return found
