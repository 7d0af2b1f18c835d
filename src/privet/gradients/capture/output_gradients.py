"""The outputs of a model under a check, and the gradients at them: of some examples, and of other shapes.

An output may be as long as the longest example of the batch, and shorter beside other examples.

Axes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from privet.errors import UnsupportedModelError

__all__ = ["differentiable", "fitted", "weighted", "within"]


def differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs that need a gradient, and raises if none does."""
    found = [o for o in outputs if o.requires_grad]
    if not found:
        raise UnsupportedModelError(
            "no output of the model depends on its trainable parameters. Expected a tensor that needs a gradient, in "
            "a tuple, list, dict or dataclass."
        )
    return found


def weighted(draw: Tensor, weights: Tensor, axis: int) -> Tensor:  # weights: (B,)
    """Returns a gradient with the weight of its example on each entry."""
    shape = [1] * draw.dim()
    shape[min(axis, draw.dim() - 1)] = -1
    return draw * weights.view(shape).to(draw)


def within(draw: Tensor, halves: Sequence[Tensor], shapes: Sequence[torch.Size], axis: int) -> Tensor:
    """Returns `draw` with zeros where the output beside other examples does not reach, for each half by its own."""
    kept = torch.zeros_like(draw)
    for half, shape in zip(halves, shapes, strict=True):
        region = tuple(slice(None) if place == axis else slice(n) for place, n in enumerate(shape))
        kept[region] += weighted(draw[region], half, axis)
    return kept


def fitted(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Returns a gradient of another shape: cut, or filled up with zeros."""
    fitted = gradient.new_zeros(shape)
    region = tuple(slice(min(n, m)) for n, m in zip(shape, gradient.shape, strict=True))
    fitted[region] = gradient[region]
    return fitted
