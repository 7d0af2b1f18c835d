"""The examples in one leaf: how many it holds, some of them, two leaves joined, and examples of zeros.

What the examples are depends on the leaf:

    leaf                                    its examples
    tensor, array                           the rows on the batch axis
    packed sequence                         the sequences
    batch of graphs                         the graphs
    column (list or tuple of plain values)  the values
    plain value                             none
    anything else                           nobody knows
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, cat
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import cut_graphs, is_graphs, join_graphs
from privet.batches.packed import cut_sequences, join_sequences, sequences_in, zero_sequences
from privet.batches.structure import REGISTER
from privet.batches.tree import is_column, is_plain
from privet.errors import ConfigurationError

__all__ = ["can_be_zero", "cut", "described", "is_opaque", "is_shape", "joined", "shows", "size_of", "unknown", "zeros"]

_ARRAYS = (Tensor, np.ndarray)


def size_of(leaf: Any, axis: int) -> int | None:
    """Returns how many examples a leaf holds if they are on `axis`, or None if it has no such axis."""
    if isinstance(leaf, _ARRAYS):
        return leaf.shape[axis] if leaf.ndim > axis else None
    if isinstance(leaf, PackedSequence):
        return sequences_in(leaf)
    if is_graphs(leaf):
        return leaf.num_graphs
    return len(leaf) if is_column(leaf) else None


def shows(leaf: Any, examples: int, axis: int) -> bool:
    """Returns whether a leaf seems to hold the examples of a batch: it is as long as the batch.

    A shape never does: it is as long as a small batch by chance.
    """
    return size_of(leaf, axis) == examples and not is_shape(leaf)


def is_shape(leaf: Any) -> bool:
    """Returns whether a leaf is a tuple of numbers, as the size of an image is; a list of numbers is not."""
    return (
        isinstance(leaf, tuple)
        and not isinstance(leaf, PackedSequence)
        and not all(isinstance(element, str | bytes) for element in leaf)
    )


def is_opaque(leaf: Any) -> bool:
    """Returns whether nobody knows if a leaf holds examples."""
    known = isinstance(leaf, Tensor | np.ndarray | PackedSequence) or is_plain(leaf) or is_column(leaf)
    return not (known or is_graphs(leaf))


def cut(leaf: Any, start: int, stop: int, axis: int) -> Any:
    """Returns examples `start` to `stop` of a leaf. A tensor or an array becomes a view."""
    if isinstance(leaf, Tensor):
        return leaf.narrow(axis, start, stop - start)
    if isinstance(leaf, np.ndarray):
        return leaf[(*(slice(None),) * axis, slice(start, stop))]
    if isinstance(leaf, PackedSequence):
        return cut_sequences(leaf, start, stop)
    if is_graphs(leaf):
        return cut_graphs(leaf, start, stop)
    return type(leaf)(list(leaf)[start:stop])


def joined(first: Any, second: Any, axis: int) -> Any:
    """Returns the examples of both leaves, which are of one kind."""
    if isinstance(first, Tensor):
        return cat([first, second], dim=axis)
    if isinstance(first, np.ndarray):
        return np.concatenate([first, second], axis=axis)
    if isinstance(first, PackedSequence):
        return join_sequences(first, second)
    if is_graphs(first):
        return join_graphs(first, second)
    return type(first)([*first, *second])


def can_be_zero(leaf: Any) -> bool:
    """Returns whether there is an example of zeros for the leaf: not so for strings, or a list of values."""
    return isinstance(leaf, Tensor | PackedSequence) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc")


def zeros(leaf: Any, count: int, axis: int) -> Any:
    """Returns `count` examples of zeros like those of a leaf that `can_be_zero`."""
    if isinstance(leaf, PackedSequence):
        return zero_sequences(leaf, count)
    shape = list(leaf.shape)
    shape[axis] = count
    return leaf.new_zeros(shape) if isinstance(leaf, Tensor) else np.zeros_like(leaf, shape=shape)


# -- errors ------------------------------------------------------------------------------------------------------------


def described(leaf: Any) -> str:
    """Returns type and size of a leaf, never its values."""
    kind = type(leaf).__name__
    if isinstance(leaf, _ARRAYS):
        size = f" of shape {tuple(leaf.shape)}"
    elif isinstance(leaf, PackedSequence):
        size = f" of {sequences_in(leaf)} sequences"
    elif is_graphs(leaf):
        size = f" of {leaf.num_graphs} graphs"
    else:
        size = f" of {len(leaf)} values" if is_column(leaf) else ""
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}{size}"


def unknown(leaf: Any, path: str, doing: str) -> ConfigurationError:
    """Returns the error for a leaf whose examples nobody knows; `doing` says what was to be done with them."""
    once = "It can be read only once: make it a list or a tensor. " if isinstance(leaf, Iterator) else ""
    return ConfigurationError(
        f"{path} is {described(leaf)}, and nobody knows which of it belongs to which example, so that it cannot be "
        f"{doing}. {once}{REGISTER}"
    )
