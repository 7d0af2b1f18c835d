"""Some of the examples replaced by others: what a model is asked to show that examples do not meet.

What is as long as the batch counts as examples, as in `cut.first_examples`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import is_graphs, select_graphs
from privet.batches.leaves import cut, joined, shows
from privet.batches.tree import mapped

__all__ = ["nearest", "rearranged"]


def nearest(replaced: Sequence[bool]) -> list[int]:
    """Returns for each example the nearest one that is not replaced: itself, if it is not.

    Copies of these keep an order that the examples have, such as that of their lengths.
    """
    stays = [index for index, gone in enumerate(replaced) if not gone]
    return [min(stays, key=lambda other: abs(other - index)) for index in range(len(replaced))]


def rearranged(
    inputs: Any,
    sources: Sequence[int],
    *,
    examples: int,
    axis: int,
    factors: Sequence[float] | None = None,
    lengths_stay: bool = False,
) -> Any:
    """Returns the inputs with example `sources[i]` in the place of example i, in whatever is as long as the batch.

    Args:
        inputs: the inputs of a model, or a batch.
        sources: for each place the example that comes there.
        examples: the number of examples in the inputs.
        axis: where tensors have their examples.
        factors: what floating-point tensors are multiplied by in each place; by default they are only moved.
        lengths_stay: whether what is one whole number for each example stays, as the lengths of sequences.
    """

    def move(leaf: Any, path: str) -> Any:
        if not shows(leaf, examples, axis) or (lengths_stay and _is_whole(leaf)):
            return leaf
        if isinstance(leaf, Tensor):
            moved = leaf.index_select(axis, torch.tensor(sources, device=leaf.device))
            return _scaled(moved, factors, axis) if leaf.is_floating_point() and factors is not None else moved
        if isinstance(leaf, np.ndarray):
            return leaf.take(list(sources), axis=axis)
        if is_graphs(leaf):
            return select_graphs(leaf, sources, factors)
        if isinstance(leaf, PackedSequence):
            return _joined([cut(leaf, source, source + 1, axis) for source in sources], axis)
        values = list(leaf)
        return type(leaf)([values[source] for source in sources])

    return mapped(inputs, move, "the inputs")


def _is_whole(leaf: Any) -> bool:
    """Returns whether a leaf is one whole number for each example."""
    if isinstance(leaf, Tensor):
        return leaf.dim() == 1 and not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype == torch.bool)
    if isinstance(leaf, np.ndarray):
        return leaf.ndim == 1 and leaf.dtype.kind in "iu"
    return isinstance(leaf, list | tuple) and all(type(value) is int for value in leaf)


def _scaled(moved: Tensor, factors: Sequence[float], axis: int) -> Tensor:
    shape = [1] * moved.dim()
    shape[axis] = -1
    factor = torch.tensor(factors, device=moved.device).view(shape)
    return torch.where(factor == 1.0, moved, moved * factor.to(moved.dtype))


def _joined(parts: Sequence[PackedSequence], axis: int) -> PackedSequence:
    whole = parts[0]
    for part in parts[1:]:
        whole = joined(whole, part, axis)
    return whole
