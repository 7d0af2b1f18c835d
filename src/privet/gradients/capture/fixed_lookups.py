"""Lookups in a small table at places that no batch changes, as relative biases are: a matrix of zeros and ones.

Torch adds the gradients of such places up one after the other, which takes long where a few entries are looked up many
times: for each pair of positions, say. A product with the matrix of which place has which entry is the same sum.

Axes: V entries of the table, N places, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.isometries import looked_up
from privet.gradients.tracing import tracing

__all__ = ["fixed_lookup"]

_MOST_ENTRIES, _LEAST_REPEATED = 512, 4


class _FixedLookup(torch.autograd.Function):
    """Entries of a table, by places of any shape."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, places: Tensor) -> Tensor:  # (V, ...), (...)
        """Returns the entries looked up."""
        ctx.places, ctx.entries, ctx.chosen = places, table.shape[0], None
        return table[places]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Returns the sums by entry."""
        rows = gradient.reshape(ctx.places.numel(), -1)
        if ctx.chosen is None:
            ctx.chosen = F.one_hot(ctx.places.flatten() % ctx.entries, ctx.entries)
        if ctx.chosen.dtype is not rows.dtype:
            ctx.chosen = ctx.chosen.to(rows.dtype)
        return (ctx.chosen.t() @ rows).reshape(ctx.entries, *gradient.shape[ctx.places.dim() :]), None


def fixed_lookup(
    function: Callable[..., Any], root: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Returns what a lookup in a parameter returns, or None if it is none, or not one of few entries many times.

    Args:
        function: takes the parameter and constants.
        root: the parameter.
        args: the positional arguments.
        kwargs: those given by name.
    """
    if function is Tensor.__getitem__:
        places = args[1]
    elif function is F.embedding:
        places = looked_up(args, kwargs)
    else:
        return None
    if not isinstance(places, Tensor) or places.dtype not in (torch.int64, torch.int32) or tracing():
        return None
    if not root.dim() or places is root or not root.is_floating_point():
        return None
    if root.shape[0] > _MOST_ENTRIES or places.numel() < _LEAST_REPEATED * root.shape[0]:
        return None
    found: Tensor = _FixedLookup.apply(root, places.long())  # type: ignore[no-untyped-call]
    return found
