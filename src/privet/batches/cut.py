"""Some of the examples of a batch.

Where the examples are is known in three ways. A batch of the private loader is built as one example and two examples
are, and what grows with the second counts examples (`cut_like`). In a batch of a user's own every tensor has to have
them on axis 0, and anything else is refused (`cut_rows`). Among the inputs of a model they are in whatever is as long
as the batch (`first_examples`): a guess, which serves the check of a model alone, and the check finds a wrong one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from privet.batches.count import each_of
from privet.batches.graphs import is_graphs
from privet.batches.leaves import cut, shows, size_of, unknown
from privet.batches.structure import is_container, parts_of, rebuilt, same_context, steps_to
from privet.batches.tree import mapped
from privet.errors import ConfigurationError

__all__ = ["cut_like", "cut_rows", "first_examples", "without_examples"]


def cut_rows(batch: Any, start: int, stop: int, *, examples: int) -> Any:
    """Returns examples `start` to `stop` of a batch whose every tensor has its `examples` on axis 0.

    Raises:
        ConfigurationError: if a tensor, array or list of values has another length, or nobody knows the examples of
            something.
    """

    def rows(leaf: Any, path: str) -> Any:
        return cut(leaf, start, stop, 0)

    return each_of(batch, rows, examples=examples, doing="cut into physical ones")


def first_examples(inputs: Any, count: int, *, examples: int, axis: int) -> Any:
    """Returns the first `count` of the examples in whatever is as long as the batch of `examples`."""

    def rows(leaf: Any, path: str) -> Any:
        return cut(leaf, 0, count, axis) if shows(leaf, examples, axis) else leaf

    return mapped(inputs, rows, "the inputs")


def without_examples(output: Any, axis: int) -> Any:
    """Returns the output of a model for one example with no row in its place: what it is for an empty batch.

    Lists of values stay as they are: one of length 1 seldom has to do with the examples.
    """

    def rows(leaf: Any, path: str) -> Any:
        holds = (isinstance(leaf, Tensor | np.ndarray | PackedSequence) or is_graphs(leaf)) and size_of(leaf, axis) == 1
        return cut(leaf, 0, 0, axis) if holds else leaf

    return mapped(output, rows, "the output")


def cut_like(one: Any, two: Any, batch: Any, start: int, stop: int, *, path: str = "the batch") -> Any:
    """Returns examples `start` to `stop` of a batch, given what batches of one example and of two look like.

    Raises:
        ConfigurationError: if the batch is built otherwise than those, with the path of what differs.
    """
    if isinstance(one, Tensor | np.ndarray) and isinstance(batch, Tensor | np.ndarray) and one.ndim == batch.ndim:
        grows = [axis for axis, (first, second) in enumerate(zip(one.shape, two.shape, strict=True)) if first != second]
        for axis in grows:
            batch = cut(batch, start * one.shape[axis], stop * one.shape[axis], axis)
        return batch
    if isinstance(one, PackedSequence) and isinstance(batch, PackedSequence):
        each = size_of(one, 0) or 0
        return batch if each == size_of(two, 0) else cut(batch, start * each, stop * each, 0)
    if is_graphs(one) and is_graphs(batch):
        return cut(batch, start, stop, 0)
    if is_container(one) and type(one) is type(batch):
        parts, first, second = parts_of(batch), parts_of(one), parts_of(two)
        if len(first) != len(second):
            return type(batch)(list(parts)[start * len(first) : stop * len(first)])
        if not same_context(one, two):
            raise unknown(batch, path, "cut into smaller ones: its registered context depends on the examples")
        if steps_to(one) == steps_to(batch):
            steps = [path + step for step in steps_to(batch)]
            pieces = zip(first, second, parts, steps, strict=True)
            return rebuilt(batch, [cut_like(a, b, part, start, stop, path=at) for a, b, part, at in pieces], path)
    elif not is_container(one) and type(one) is type(batch):
        return one * (stop - start) if isinstance(one, int) and one != two else batch
    raise ConfigurationError(
        f"{path} is a {type(batch).__name__} where a batch of one example holds a {type(one).__name__}, or holds other "
        "keys, so that it cannot be cut into smaller ones. Expected collate_fn to build all batches alike. Give a "
        "physical batch size that fits instead of 'auto'."
    )
