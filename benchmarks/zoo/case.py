"""What a case of the zoo is: a model, batches for it, and the loss of each example.

Every architecture is built tiny, from a configuration, with random weights: nothing is downloaded.

Legend: B examples, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CLASSES", "LARGE", "TINY", "Batch", "Case", "Size", "floats", "ids", "images", "labels", "pair", "tokens"]

Batch = tuple[Tensor, ...]
"""Tensors whose axis 0 is the examples."""

CLASSES = 3


@dataclass(frozen=True)
class Size:
    """How large a model is built. For exactness the numbers coincide: positions, width and one batch size are equal."""

    width: int = 16
    positions: int = 16
    heads: int = 4
    layers: int = 2
    words: int = 50
    pixels: int = 32
    batch: int = 5


TINY = Size()
LARGE = Size(width=256, positions=128, heads=8, words=1000, pixels=64, batch=16)


@dataclass(frozen=True)
class Case:
    """One architecture.

    Args:
        name: what it is called, on the page and in `ZOO=`.
        build: returns the model, with its own defaults (dropout and all).
        batch: returns random inputs for a number of examples.
        loss: returns the loss of each example, (B,), of a model and a batch.
        family: the group that it is shown in.
        needs: packages without which it is skipped.
        note: for users: what to know of it, or the way on where it is refused.
        refused: part of the message with which both doors must refuse it, or "" where it must run.
        paper: whether it can be used at the paper's door.
        double: whether it can run in float64.
        prepare: what is done to the private copies alone, such as turning checkpoints on. Plain autograd has none.
        way: how a step is taken at the explicit door: arguments of `Performance`. It is then the only door.
        short: whether one clip norm is enough, without dropout: for other ways to train a model that has a case.
    """

    name: str
    build: Callable[[Size], nn.Module]
    batch: Callable[[int, Size], Batch]
    loss: Callable[[nn.Module, Any], Tensor]
    family: str = ""
    needs: tuple[str, ...] = ()
    note: str = ""
    refused: str = ""
    paper: bool = True
    double: bool = True
    prepare: Callable[[Any], object] | None = None
    way: tuple[tuple[str, Any], ...] = ()
    short: bool = False

    def of(self, family: str, *needs: str) -> Case:
        """Returns the case as one of a family."""
        return replace(self, family=family, needs=(*needs, *self.needs))


def ids(n: int, s: Size) -> Batch:
    """Returns tokens, (B, T). The lowest ones are left out: models give them meanings."""
    return (torch.randint(3, s.words, (n, s.positions)),)


def labels(n: int) -> Tensor:
    """Returns a class for each example, (B,)."""
    return torch.randint(CLASSES, (n,))


def tokens(n: int, s: Size) -> Batch:
    """Returns tokens (B, T), and a class for each example."""
    return (*ids(n, s), labels(n))


def pair(n: int, s: Size) -> Batch:
    """Returns two sequences of tokens, (B, T) and (B, T)."""
    return (*ids(n, s), *ids(n, s))


def images(n: int, s: Size) -> Batch:
    """Returns images (B, 3, P, P), and a class for each."""
    return (torch.randn(n, 3, s.pixels, s.pixels), labels(n))


def floats(*shape: int) -> Callable[[int, Size], Batch]:
    """Returns a function that returns vectors (B, *shape), and a class for each."""
    return lambda n, s: (torch.randn(n, *shape), labels(n))


def classified(logits: Tensor, wanted: Tensor) -> Tensor:  # (B, ..., V), (B, ...) -> (B,)
    """Returns the cross entropy of each example, the mean over its positions."""
    losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none")
    return losses.view(wanted.shape[0], -1).mean(1)


def squares(output: Tensor) -> Tensor:  # (B, ...) -> (B,)
    """Returns the mean square of each example's output."""
    return output.flatten(1).square().mean(1)


def by_class(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the loss of a classifier of vectors, or of anything else that comes first in the batch."""
    out: Any = model(batch[0])
    return classified(getattr(out, "logits", out), batch[1])
