"""Rows that belong to examples by a list and not by their place: tokens that a router hands to experts.

Inside of `rows_of`, row i of a tensor of R rows belongs to example `owner[i]`. What a parameter met there is put back
in the order of the examples when the gradient has come, each example's rows one after the other and filled up with
zeros, which add nothing: from there on they are positions like any other.

Axes: B examples, R rows, L rows of the example that has most.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from privet.errors import ConfigurationError, UnsupportedModelError
from privet.gradients.layout import Site
from privet.gradients.rules.free import EXPANSIONS
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation

__all__ = ["Routed", "owners_for", "routed_now", "rows_of"]

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_local = threading.local()


class Routed:
    """Which example each row belongs to."""

    def __init__(self, owner: object) -> None:
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
        if self.rows and not 0 <= int(self.owner.min()) <= int(self.owner.max()) < examples:
            raise ConfigurationError(
                f"rows_of was given places that are not in a batch of {examples}. Expected numbers from 0 to "
                "B - 1, counted in the batch as the model got it."
            )

    @cached_property
    def _ranks(self) -> tuple[Tensor, int]:
        """Returns which of its example's rows each row is, and L."""
        order = self.owner.argsort(stable=True)
        counts = torch.bincount(self.owner)
        starts = counts.cumsum(0) - counts
        ranks = torch.empty_like(self.owner)
        ranks[order] = torch.arange(self.rows, device=self.owner.device) - starts[self.owner[order]]
        return ranks, int(counts.max()) if self.rows else 0

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


def owners_for(operation: Operation, parameters: Sequence[str], examples: int) -> Routed:
    """Returns the owners of the rows that an operation is about to meet.

    Raises:
        UnsupportedModelError: if the operation does not treat all rows alike.
        ConfigurationError: if a row belongs to no example of the batch.
    """
    routed = routed_now()
    assert routed is not None
    if not operation.positionwise:
        raise UnsupportedModelError(
            f"{type(operation).__name__} of {', '.join(parameters)} met rows inside rows_of. Expected operations that "
            "treat all rows alike there (linear, embedding, layer norm)."
        )
    routed.require_examples(examples)
    return routed


def routed_now() -> Routed | None:
    """Returns the owners in force, in this thread."""
    found: Routed | None = getattr(_local, "routed", None)
    return found
