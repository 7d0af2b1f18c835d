"""Rows that lie in another order than example by example: two views joined along the batch, or positions outside.

    cat([a, b])                            2 x B        outer = 2, inner = 1
    cat([a, b]).flatten(0, 1)              2 x B x T    outer = 2, inner = T
    cat([a, b]).transpose(0, 1)            T, 2 x B     outer = 2, inner = 1, on axis 1
    x.transpose(0, 1).flatten(0, 1)        T x B        outer = T, inner = 1

A shape does not tell such an order from rows that lie example by example. So it is found out by what the examples do
(`capture/orders.py`), and taken for what was seen: for as many rows of each example, or for other numbers once two of
them have told which of both factors stays.

Axes: B examples, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Turned", "by_row", "orders", "same_order"]


@dataclass(frozen=True)
class Turned:
    """An axis is `outer` times the batch, with `inner` rows of an example together."""

    outer: int
    inner: int
    axis: int = 0

    @property
    def value(self) -> str:
        """Returns how the rows lie, in words."""
        return f"axis {self.axis} is {self.outer} times the batch, with {self.inner} rows of an example together"

    def fits(self, rows: int, examples: int) -> bool:
        """Returns whether so many rows can lie like this."""
        return rows == self.outer * examples * self.inner

    def owner(self, examples: int, device: torch.device | None = None) -> Tensor:  # (R,)
        """Returns the example of each row."""
        return torch.arange(examples, device=device).repeat_interleave(self.inner).repeat(self.outer)

    def examples_first(self, t: Tensor, examples: int) -> Tensor:  # (R, ...) -> (B, R / B, ...)
        """Returns the rows by example."""
        t = t.movedim(self.axis, 0)
        rest = t.shape[1:]
        apart = t.reshape(self.outer, examples, self.inner, *rest).movedim(1, 0)
        return apart.reshape(examples, self.outer * self.inner, *rest)


def orders(rows: int, examples: int, *, batch_first: bool, axis: int = 0) -> list[Turned]:
    """Returns the orders that so many rows may lie in, but for the one in which merged axes lie as a rule."""
    each = rows // max(examples, 1)
    if rows != each * examples:
        return []
    found = [Turned(outer, each // outer, axis) for outer in range(1, each + 1) if each % outer == 0]
    return found[1:] if batch_first else found[:-1]


def same_order(known: Iterable[Turned], rows: int, examples: int) -> Turned | None:
    """Returns the order of so many rows where other numbers of rows have been seen, or None if nothing tells it.

    Two numbers of rows for each example that agree in one factor, and not in the other, tell which of them stays.

    Args:
        known: the orders that were seen, all of one axis.
        rows: R.
        examples: B.
    """
    seen = list(known)
    exact = next((order for order in seen if order.fits(rows, examples)), None)
    each = rows // max(examples, 1)
    if exact is not None or rows != each * examples or len(seen) < 2:
        return exact
    outers, inners = {order.outer for order in seen}, {order.inner for order in seen}
    if len(outers) == 1 and not each % (outer := outers.pop()):
        return Turned(outer, each // outer, seen[0].axis)
    if len(inners) == 1 and not each % (inner := inners.pop()):
        return Turned(each // inner, inner, seen[0].axis)
    return None


def by_row(t: Tensor) -> Tensor:  # (R, ...) -> (R, N)
    """Returns a tensor with one axis behind its rows."""
    return t.flatten(1) if t.dim() > 1 else t.unsqueeze(1)
