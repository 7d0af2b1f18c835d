"""Inputs as long as the batch by coincidence, such as a (T, T) mask with T = B: hidden while a model is checked.

A hidden tensor is a leaf of which nothing is known, so that no tool that cuts or repeats examples touches it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from privet.batches.flat import as_given, is_rearranged
from privet.batches.leaves import shows
from privet.batches.tree import leaves_in, mapped

__all__ = ["opened", "opening", "with_squares_kept"]


class _Kept:
    """A tensor that holds no examples."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Opening(nn.Module):
    """A module that is given what was hidden."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*opened(args), **opened(kwargs))


def with_squares_kept(inputs: Any, *, examples: int, axis: int) -> Any:
    """Returns the inputs with every tensor hidden that has the length of the batch on two axes or more.

    The first tensor that is as long as the batch stays: it is the one that the examples are counted by.
    """
    first = True

    def hide(leaf: Any, path: str) -> Any:
        nonlocal first
        if not isinstance(leaf, Tensor) or not shows(leaf, examples, axis):
            return leaf
        counted, first = first, False
        return leaf if counted or list(leaf.shape).count(examples) < 2 else _Kept(leaf)

    return mapped(inputs, hide, "the inputs")


def opened(inputs: Any) -> Any:
    """Returns the inputs with what was hidden in its place, and flat rows as the model takes them."""
    return mapped(as_given(inputs), lambda leaf, _: leaf.tensor if isinstance(leaf, _Kept) else leaf, "the inputs")


def opening(module: nn.Module, inputs: Any) -> nn.Module:
    """Returns a module that takes these inputs, of which some may be hidden, in place of `module`."""
    hidden = is_rearranged(inputs) or any(isinstance(leaf, _Kept) for leaf in leaves_in(inputs))
    return _Opening(module) if hidden else module
