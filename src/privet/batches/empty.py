"""The batch of no examples, made of what batches of one example and of two look like.

What doubles counts examples, wherever it stands, and is cut to nothing. What does not change keeps its shape, with the
values of tensors set to zero.

    leaf                              becomes
    tensor, array                     0 along each axis that doubles; zeros of the same shape if none does
    packed sequence that doubles      the empty one
    batch of graphs                   the empty one, which keeps what one graph of zeros looks like
    list or tuple that doubles        the empty one
    any other container               itself, each part treated alike
    whole number that doubles         0
    number, string, None otherwise    itself if it does not depend on the number of examples
    anything else                     an error
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import emptied_graphs, hollow_graphs, is_graphs
from privet.batches.leaves import cut, size_of
from privet.batches.structure import is_container, parts_of, rebuilt, same_context, steps_to
from privet.batches.tree import mapped
from privet.errors import ConfigurationError

__all__ = ["UnknownLeafError", "emptied", "hollow"]


class UnknownLeafError(Exception):
    """A leaf whose examples cannot be counted; the message begins with its path."""


def hollow(batch: Any) -> Any:
    """Returns the structure with every tensor and array replaced by zeros: no content of an example is kept."""

    def zeroed(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            return torch.zeros_like(leaf, requires_grad=False)
        if isinstance(leaf, PackedSequence):
            return PackedSequence(torch.zeros_like(leaf.data, requires_grad=False), *leaf[1:])
        if is_graphs(leaf):
            return hollow_graphs(leaf)
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype != object else leaf

    return mapped(batch, zeroed, "the batch", afresh=True)


def emptied(one: Any, two: Any, path: str = "the batch") -> Any:
    """Returns a new empty batch like two structures, of one example and of two.

    Raises:
        UnknownLeafError: if the examples in a leaf cannot be told, with its path and type.
    """
    if type(one) is not type(two):
        raise UnknownLeafError(f"{path}, a {type(one).__name__} that becomes a {type(two).__name__},")
    if isinstance(one, Tensor):
        shape = _emptied_shape(one.shape, two.shape, path)
        return torch.zeros(shape, dtype=one.dtype, device=one.device)
    if isinstance(one, np.ndarray) and one.dtype != object:
        return np.zeros(_emptied_shape(one.shape, two.shape, path), dtype=one.dtype)
    if isinstance(one, PackedSequence):
        (count,) = _emptied_shape([size_of(one, 0) or 0], [size_of(two, 0) or 0], path)
        return cut(one, 0, count, 0)
    if is_graphs(one):
        return emptied_graphs(one, two)
    if is_container(one):
        return _emptied_container(one, two, path)
    if isinstance(one, int) and not isinstance(one, bool) and two == 2 * one:
        return 0
    if one is None or (isinstance(one, bool | int | float | complex | str | bytes) and one == two):
        return one
    raise UnknownLeafError(f"{path}, a {type(one).__name__},")


def _emptied_container(one: Any, two: Any, path: str) -> Any:
    first, second = parts_of(one), parts_of(two)
    if len(first) != len(second):
        if isinstance(one, list | tuple | deque) and len(second) == 2 * len(first):
            return type(one)()
        raise UnknownLeafError(f"{path}, a {type(one).__name__} of varying length,")
    if not same_context(one, two):
        raise UnknownLeafError(f"{path}, a {type(one).__name__} whose registered context depends on the examples,")
    pieces = zip(first, second, steps_to(one), strict=True)
    parts = [emptied(a, b, path + step) for a, b, step in pieces]
    try:
        return rebuilt(one, parts, path)
    except ConfigurationError as error:
        raise UnknownLeafError(f"{path}, a {type(one).__name__} that cannot be built of no examples,") from error


def _emptied_shape(one: Sequence[int], two: Sequence[int], path: str) -> list[int]:
    if len(one) != len(two) or any(second not in (first, 2 * first) for first, second in zip(one, two, strict=False)):
        raise UnknownLeafError(f"{path}, of shape {tuple(one)} for one example and {tuple(two)} for two,")
    return [first if first == second else 0 for first, second in zip(one, two, strict=True)]
