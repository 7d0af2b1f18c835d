"""How many examples a batch has, and whether all of it agrees.

The first tensor with the batch axis decides, or packed sequence, or batch of graphs; and the first array or column of
values where there is no tensor. Other tensors may be of another size: a mask of `(T, T)` or the weights of classes are
no examples. What has to hold examples in every leaf, such as a batch that is cut, uses `each_of`, which says which two
leaves disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from privet.batches.graphs import is_graphs
from privet.batches.leaves import described, is_opaque, is_shape, size_of, unknown
from privet.batches.structure import REGISTER
from privet.batches.tree import is_column, leaves_in, mapped, paths_in
from privet.errors import ConfigurationError, UnsupportedModelError

__all__ = ["count_examples", "each_of"]


def count_examples(tree: Any, axis: int = 0, *, name: str = "the batch") -> int:
    """Returns the number of examples: what the first tensor or packed sequence with the batch axis holds.

    Args:
        tree: a batch, or all inputs of a model.
        axis: where tensors have their examples.
        name: what the tree is called in errors.

    Raises:
        UnsupportedModelError: if nothing in it holds examples, with the path and type of what it holds.
    """
    for leaf in leaves_in(tree):
        if isinstance(leaf, Tensor):
            if leaf.dim() > axis:
                return leaf.shape[axis]
        elif isinstance(leaf, PackedSequence) or is_graphs(leaf):
            return size_of(leaf, axis) or 0
    found = _first_other(tree, axis)
    if found is not None:
        return found
    held = [f"{path} is {described(leaf)}" for path, leaf in paths_in(tree, name)]
    raise UnsupportedModelError(
        f"the examples cannot be counted: nothing in {name} is a tensor with an axis {axis}. "
        f"{'; '.join(held[:4]) or name + ' is empty'}. Expected a tensor with a row for each example. {REGISTER}"
    )


def _first_other(tree: Any, axis: int) -> int | None:
    """Returns what the first array holds, or else the first list of values; 0 if there are empty lists alone."""
    leaves = [leaf for leaf in leaves_in(tree) if not is_shape(leaf)]
    arrays = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
    columns = [leaf for leaf in leaves if is_column(leaf)]
    for leaf in (*arrays, *filter(None, columns)):
        if (size := size_of(leaf, axis)) is not None:
            return size
    return 0 if columns and not any(map(is_opaque, leaves)) else None


def each_of(batch: Any, change: Callable[[Any, str], Any], *, examples: int, doing: str) -> Any:
    """Returns the batch with `change(leaf, path)` in place of every leaf that holds its examples, which are on axis 0.

    Plain values and tensors without axes hold none, and stay as they are.

    Args:
        batch: whose every tensor, array, packed sequence and column of values has one entry for each example.
        change: what is done to a leaf.
        examples: how many there are.
        doing: what is done, for errors: "cut into physical ones".

    Raises:
        ConfigurationError: if two leaves disagree about the number of examples, with both paths; or if nobody knows the
            examples of one, with its path and type.
    """

    def checked(leaf: Any, path: str) -> Any:
        size = size_of(leaf, 0)
        if size is None:
            if is_opaque(leaf):
                raise unknown(leaf, path, doing)
            return leaf
        if size != examples:
            raise _disagreement(batch, leaf, path, examples=examples, doing=doing)
        return change(leaf, path)

    return mapped(batch, checked, "the batch")


def _disagreement(batch: Any, leaf: Any, path: str, *, examples: int, doing: str) -> ConfigurationError:
    others = ((at, other) for at, other in paths_in(batch, "the batch") if size_of(other, 0) == examples)
    agrees = [f"{at} is {described(other)}" for at, other in others]
    whole = agrees[0] if agrees else f"the batch has {examples} examples"
    return ConfigurationError(
        f"{path} is {described(leaf)}, and {whole}: they disagree about the number of examples, so that the batch "
        f"cannot be {doing}. Expected the examples on axis 0 of every tensor, array and list. Keep what is not of "
        "examples in the loss or the model."
    )
