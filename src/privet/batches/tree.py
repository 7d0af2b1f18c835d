"""Walks through nested containers: their leaves, the path of each leaf, and the same containers with other leaves.

A leaf is anything but a container. A *column* is a leaf too: a list or tuple of plain values only, such as the names of
the examples, for an operation on examples has to cut it as a whole.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import RowsTold, graph_tensors, is_graphs, rows_of_graphs
from privet.batches.structure import parts_or_none, rebuilt, steps_to

__all__ = ["is_column", "is_plain", "leaves_in", "mapped", "paths_in", "rows_told_in", "taken_apart", "tensors_in"]

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), enum.Enum),
    *(np.generic, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)

# Tuples, for `isinstance` is faster with them than with unions, and much of this runs in every step.
_SEQUENCES = (list, tuple, deque)
_NO_COLUMNS = (torch.Size, PackedSequence)


def is_plain(value: Any) -> bool:
    """Returns whether a value is a number, a string or the like: something that holds no examples by itself."""
    return isinstance(value, _PLAIN)


def is_column(value: Any) -> bool:
    """Returns whether a value is a list, tuple or deque of plain values only. A namedtuple is a record instead."""
    return (
        isinstance(value, _SEQUENCES)
        and not isinstance(value, _NO_COLUMNS)
        and not hasattr(value, "_fields")
        and all(isinstance(element, _PLAIN) for element in value)
    )


def leaves_in(tree: Any) -> Iterator[Any]:
    """Yields the leaves, in order. Stops where the caller stops: counting reads no further than it has to."""
    parts = parts_or_none(tree)
    if parts is None or is_column(tree):
        yield tree
    else:
        for part in parts:
            if isinstance(part, Tensor):
                yield part
            else:
                yield from leaves_in(part)


def paths_in(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) for each leaf, in order. `name` stands for the whole, as in `the batch['x'][0]`."""
    parts = parts_or_none(tree)
    if parts is None or is_column(tree):
        yield name, tree
    else:
        for step, part in zip(steps_to(tree), parts, strict=True):
            yield from paths_in(part, name + step)


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors, in order; of packed sequences their data, and all those of a batch of graphs."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    for leaf in leaves_in(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, PackedSequence):
            found.append(leaf.data)
        elif is_graphs(leaf):
            found += graph_tensors(leaf)
    return found


def rows_told_in(tree: Any) -> list[RowsTold]:
    """Returns what batches of graphs say of the rows of their tensors.

    Raises:
        ConfigurationError: if a batch of graphs contradicts itself.
    """
    return [each for leaf in leaves_in(tree) if is_graphs(leaf) for each in rows_of_graphs(leaf)]


def mapped(tree: Any, change: Callable[[Any, str], Any], name: str, *, afresh: bool = False) -> Any:
    """Returns the tree with `change(leaf, path)` in place of each leaf.

    A container in which nothing changed is handed on itself, unless all are to be made `afresh`: it may be a cache, a
    configuration or another object that its class cannot build a second time. A new one has nothing but its parts.

    Raises:
        ConfigurationError: if a container cannot be built with other parts, with its path.
    """
    if isinstance(tree, Tensor):
        return change(tree, name)
    parts = parts_or_none(tree)
    if parts is None or is_column(tree):
        new = change(tree, name)
        return rebuilt(tree, parts, name) if afresh and parts is not None and new is tree else new
    changed = [
        mapped(part, change, name + step, afresh=afresh) for step, part in zip(steps_to(tree), parts, strict=True)
    ]
    if not afresh and all(new is old for new, old in zip(changed, parts, strict=True)):
        return tree
    return rebuilt(tree, changed, name)


def taken_apart(
    tree: Any, chosen: Callable[[Any], bool], name: str = "the batch"
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Returns the chosen leaves, in order, and a function that puts others in their place, in new containers."""
    taken = [leaf for leaf in leaves_in(tree) if chosen(leaf)]

    def put(others: Sequence[Any]) -> Any:
        left = iter(others)
        return mapped(tree, lambda leaf, _: next(left) if chosen(leaf) else leaf, name, afresh=True)

    return taken, put
