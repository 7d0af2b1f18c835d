"""Augmentation multiplicity: K views of one example, whose gradients are averaged before the example is clipped.

The loss of an example is the mean of the losses of its views. Its gradient is then the mean of the views' gradients,
and that mean is what is clipped: one example still adds one clipped gradient, and epsilon is the same for any K.
Source: De et al., "Unlocking High-Accuracy Differentially Private Image Classification through Scale" (2022,
arXiv:2204.13650), section 3.2.

Axes: B examples, K views, C channels, H and W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet._checks import check_count
from privet.batches.count import count_examples, each_of
from privet.batches.leaves import described
from privet.batches.tree import is_column, leaves_in, mapped
from privet.errors import ConfigurationError
from privet.training.once import called_by_user

__all__ = ["Augmented", "RandomCrop"]


@final
class Augmented:
    """A loss per example that is the mean over K views of the example.

    Args:
        loss: `loss(model, batch)` returns the loss of each row of the batch.
        views: K.
        transform: makes the rows of a batch differ: it gets the batch's first tensor, in which each example stands K
            times in a row, `(B * K, ...)`, and returns a tensor with as many rows. Each row has to be made of that row
            alone. None if the batch's first tensor holds the views already, as `(B, K, ...)`.
        whole_batch: whether `transform` gets and returns the whole batch, all of whose tensors are repeated.
        separate: whether the model runs once for each view, on B rows, in place of once on B * K rows. The gradient is
            the same. At the paper's door it always does, for there a row of a forward is an example.

    Guarantees:
        The gradient of an example is formed over all of its views before its norm is taken, cross terms included. One
        example moves a step's sum by at most the clipping's sensitivity, whatever K is. Nothing more is billed.
        With `passes=2` both backwards go through one forward, and so through the same views.

    Raises:
        ConfigurationError: for options that are out of range. When it is called: for a batch that cannot be repeated, a
            first tensor without K views, a transform that changes the number of rows, or a loss that is not one number
            for each row.

    Example:
        >>> import torch
        >>> from privet import Augmented
        >>> def loss(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> augmented = Augmented(loss, views=4, transform=lambda x: x + 0.1 * torch.randn_like(x))
        >>> augmented(torch.nn.Linear(5, 2), (torch.randn(3, 5), torch.tensor([0, 1, 1]))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        views: int,
        transform: Callable[[Any], Any] | None = None,
        whole_batch: bool = False,
        separate: bool = False,
    ) -> None:
        if not callable(loss):
            raise ConfigurationError(f"loss must be a function of model and batch, got {type(loss).__name__}.")
        if transform is not None and not callable(transform):
            raise ConfigurationError(
                f"transform must be a function of a tensor of rows, got {type(transform).__name__}. For views that are "
                "in the batch already, leave it away."
            )
        if whole_batch and transform is None:
            raise ConfigurationError("whole_batch=True is about transform, and none was given. Give one, or leave it.")
        self.views = check_count("views", views, 1)
        self._loss, self._transform, self._whole, self._separate = loss, transform, whole_batch, separate

    def __repr__(self) -> str:
        return f"Augmented({self._loss!r}, views={self.views}, transform={self._transform!r})"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:  # (B,)
        """Returns the loss of each example: the mean over its views.

        Raises:
            ConfigurationError: see the class.
        """
        examples, views = count_examples(batch), self.views
        if self._transform is None:
            _require_views(batch, examples, views)
        if self._separate or called_by_user(model):
            # Added up and not stacked: the loss of the paper's door is read from its graph, where B x K may be B x B.
            shown = [self._losses(model, self._view(batch, view), examples) for view in range(views)]
            return functools.reduce(torch.add, shown) / views
        rows = self._changed(self._repeated(batch, examples))
        return self._losses(model, rows, examples * views).view(examples, views).mean(1)

    def _losses(self, model: nn.Module, batch: Any, rows: int) -> Tensor:  # (rows,)
        losses: object = self._loss(model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (rows,):
            found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigurationError(
                f"the loss of Augmented returned {found} for {rows} rows. Expected one loss for each row, of shape "
                f"({rows},): use reduction='none', and take the mean or sum over all axes but the first."
            )
        return losses

    def _view(self, batch: Any, view: int) -> Any:
        """Returns a batch of one view of each example."""
        if self._transform is None:
            return _with_first(batch, lambda x: x[:, view])
        return self._changed(batch)

    def _repeated(self, batch: Any, examples: int) -> Any:
        """Returns a batch in which each example stands K times in a row; in the first tensor are its views if any."""
        first = _first(batch)

        def change(leaf: Any, path: str) -> Any:
            if leaf is first and self._transform is None:
                return leaf.flatten(0, 1)
            return _repeat(leaf, path, self.views)

        return each_of(batch, change, examples=examples, doing="shown in several views")

    def _changed(self, batch: Any) -> Any:
        """Returns the batch as the transform makes it."""
        if self._transform is None:
            return batch
        rows = count_examples(batch)
        changed = self._transform(batch) if self._whole else _with_first(batch, self._transform)
        if (found := count_examples(changed)) != rows:
            raise ConfigurationError(
                f"transform returned {found} rows for {rows}. Expected as many rows as it was given, each made of that "
                "row alone: it is given every example once for each view."
            )
        return changed


def _first(batch: Any) -> Tensor:
    for leaf in leaves_in(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf
    raise ConfigurationError(
        "nothing in the batch is a tensor with rows. Expected the inputs as its first tensor. Give "
        "whole_batch=True and a transform of the whole batch."
    )


def _with_first(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns the batch with another first tensor."""
    first, done = _first(batch), False

    def changed(leaf: Any, _: str) -> Any:
        nonlocal done
        if leaf is not first or done:
            return leaf
        done = True
        new: object = change(leaf)
        if not isinstance(new, Tensor) or not new.dim():
            raise ConfigurationError(f"transform returned {described(new)}. Expected a tensor with rows.")
        return new

    return mapped(batch, changed, "the batch")


def _require_views(batch: Any, examples: int, views: int) -> None:
    shape = tuple(_first(batch).shape)
    if shape[:2] != (examples, views):
        raise ConfigurationError(
            f"the batch's first tensor has shape {shape}, and views={views} was given without a transform. Expected "
            f"the views on axis 1, ({examples}, {views}, ...). Give a transform that makes them, or another number."
        )


def _repeat(leaf: Any, path: str, times: int) -> Any:
    """Returns a leaf of B rows in which each stands several times in a row."""
    if isinstance(leaf, Tensor):
        return leaf.unsqueeze(1).expand(-1, times, *leaf.shape[1:]).flatten(0, 1)
    if isinstance(leaf, np.ndarray):
        return np.repeat(leaf, times, 0)
    if is_column(leaf):
        return type(leaf)(value for value in leaf for _ in range(times))
    raise ConfigurationError(
        f"{path} is {described(leaf)}, whose rows cannot be repeated. Expected tensors, arrays or lists of values with "
        "one entry for each example. Give separate=True, which runs the model once for each view."
    )


@final
class RandomCrop:
    """A transform of pictures: each row is padded, cut out anew at random, and mirrored by a coin where asked for.

    Every row has numbers of its own, from torch's global generator. They protect nothing.

    Args:
        padding: how many pixels of mirrored border are added on each side, and so the most that a picture is shifted.
        flip: whether a picture is mirrored from left to right with probability 1/2. Not for digits or letters.

    Raises:
        ConfigurationError: for a padding that is no whole number of at least 0, or is not below the size of the
            pictures; or for a tensor that is not of shape `(rows, C, H, W)`.

    Example:
        >>> import torch
        >>> from privet import RandomCrop
        >>> RandomCrop(4, flip=True)(torch.rand(6, 3, 32, 32)).shape
        torch.Size([6, 3, 32, 32])
    """

    def __init__(self, padding: int, *, flip: bool = False) -> None:
        self.padding, self.flip = check_count("padding", padding, 0), bool(flip)

    def __repr__(self) -> str:
        return f"RandomCrop({self.padding}, flip={self.flip})"

    def __call__(self, pictures: Tensor) -> Tensor:  # (rows, C, H, W)
        """Returns the pictures, each shifted and perhaps mirrored."""
        if pictures.dim() != 4 or self.padding >= min(pictures.shape[2:]):
            raise ConfigurationError(
                f"RandomCrop({self.padding}) was given a tensor of shape {tuple(pictures.shape)}. Expected pictures, "
                "(rows, channels, height, width), of more pixels than the padding."
            )
        if not len(pictures):
            return pictures
        # Pixels are gathered along the axes of the picture alone: no row is ever indexed by another one.
        padded = F.pad(pictures, (self.padding,) * 4, mode="reflect")
        down = self._places(pictures, 2)[:, None, :, None]
        across = self._places(pictures, 3, flip=self.flip)[:, None, None, :]
        channels, height, width = pictures.shape[1:]
        taken = padded.gather(2, down.expand(-1, channels, -1, padded.shape[3]))
        return taken.gather(3, across.expand(-1, channels, height, width))

    def _places(self, pictures: Tensor, axis: int, *, flip: bool = False) -> Tensor:  # (rows, size of the axis)
        """Returns which pixels of the padded picture are kept, along one axis."""
        rows, device = pictures.shape[0], pictures.device
        places = torch.arange(pictures.shape[axis], device=device).expand(rows, -1)
        if flip:
            mirrored = torch.randint(2, (rows, 1), device=device).bool()
            places = torch.where(mirrored, places.flip(1), places)
        return places + torch.randint(2 * self.padding + 1, (rows, 1), device=device)
