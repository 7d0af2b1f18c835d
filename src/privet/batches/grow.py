"""More examples than a batch has: one more, for a model that is asked where its batch axis is, or one of zeros.

What is as long as the batch counts as examples, as in `cut.first_examples`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, int8, int16, int32, int64
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import is_graphs, with_tensors, zero_graph
from privet.batches.leaves import (
    can_be_zero,
    cut,
    described,
    is_opaque,
    is_shape,
    joined,
    shows,
    size_of,
    unknown,
    zeros,
)
from privet.batches.packed import detached as detached_sequences
from privet.batches.tree import mapped, paths_in

__all__ = ["detached", "grown", "left_out", "one_of_zeros", "refuse_read_once"]

_WHOLE = (int64, int32, int16, int8)
_NAME = "the inputs"
"""What the whole is called in paths."""


def grown(inputs: Any, *, examples: int, axis: int) -> Any:
    """Returns the inputs with one more example, a copy of the last, in whatever is as long as the batch."""

    def grow(leaf: Any, path: str) -> Any:
        if not shows(leaf, examples, axis):
            return leaf
        return joined(leaf, cut(leaf, examples - 1, examples, axis), axis)  # the last packed sequence is the shortest

    return mapped(inputs, grow, _NAME)


def one_of_zeros(inputs: Any, *, axis: int, length: int = 0) -> Any:
    """Returns the inputs of no examples with one example of zeros in its place, as models do not run on none.

    Args:
        inputs: the inputs.
        axis: where tensors have their examples.
        length: the number in the place of zero where an example is one whole number.
    """

    def fill(leaf: Any, path: str) -> Any:
        if is_graphs(leaf):
            return leaf if leaf.num_graphs else zero_graph(leaf)
        if not can_be_zero(leaf) or size_of(leaf, axis) != 0:
            return leaf
        one = zeros(leaf, 1, axis)
        whole = isinstance(leaf, Tensor) and leaf.dim() == 1 and leaf.dtype in _WHOLE
        return one + length if whole and length else one

    return mapped(inputs, fill, _NAME)


def detached(inputs: Any) -> Any:
    """Returns the inputs without their graph."""

    def detach(leaf: Any, path: str) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach() if leaf.requires_grad else leaf
        if is_graphs(leaf):
            return with_tensors(leaf, Tensor.detach)
        return detached_sequences(leaf) if isinstance(leaf, PackedSequence) else leaf

    return mapped(inputs, detach, _NAME)


def refuse_read_once(inputs: Any) -> None:
    """Raises a ConfigurationError if something in the inputs can be read only once, with its path: a generator, say."""
    for path, leaf in paths_in(inputs, _NAME):
        if isinstance(leaf, Iterator):
            raise unknown(leaf, path, "given to a model more than once, as the check on the first batch does")


def left_out(inputs: Any, examples: int) -> list[str]:
    """Returns what in the inputs may hold examples and is not seen to, as `path is a Type`: for errors."""
    leaves = paths_in(inputs, _NAME)
    return [
        f"{path} is {described(leaf)}"
        for path, leaf in leaves
        if is_opaque(leaf) or (is_shape(leaf) and len(leaf) == examples)
    ]
