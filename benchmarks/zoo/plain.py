"""What must come out, by plain autograd: one example at a time, or one example's loss at a time.

It shares no code with the library, on purpose.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Batch, Case

__all__ = ["Expected", "alone", "clipped", "norms", "seeded", "together"]

Gradients = list[dict[str, Tensor]]
"""The gradient of each example, by parameter."""


def seeded(seed: int) -> None:
    """Seeds every generator that a forward may draw from: masks of spectra come from NumPy's."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the one that models draw from
    torch.manual_seed(seed)


def _gradient(loss: Tensor, parameters: Mapping[str, nn.Parameter], *, keep: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=keep)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def alone(case: Case, model: nn.Module, batch: Batch) -> Gradients:
    """Returns the gradient of each example, from a batch of that example alone."""
    model = copy.deepcopy(model)
    rows = [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    return [_gradient(case.loss(model, row).sum(), _trainable(model)) for row in rows]


def together(case: Case, model: nn.Module, batch: Batch, seed: int, *, anew: bool = False) -> Gradients:
    """Returns the gradient of each example's loss in one forward of all: the same dropout as a private step draws.

    Args:
        case: what is examined.
        model: the model, which is copied.
        batch: all examples.
        seed: what the generators begin with.
        anew: whether one forward came before, after which torch's generator was set back, and Python's and NumPy's were
            not: so a private forward draws that is run once more because its rows were moved.
    """
    model = copy.deepcopy(model)
    seeded(seed)
    if anew:
        with torch.no_grad():
            case.loss(model, batch)
        torch.manual_seed(seed)
    losses = case.loss(model, batch)
    return [_gradient(loss, _trainable(model), keep=True) for loss in losses]


def norms(gradients: Gradients) -> list[float]:
    """Returns the Euclidean norm of each example's gradient, over all parameters."""
    return [float(sum(float(g.double().square().sum()) for g in each.values())) ** 0.5 for each in gradients]


class Expected:
    """The sum of clipped gradients, and how large its terms are: rounding errors are relative to those."""

    def __init__(self, gradients: Gradients, bound: float) -> None:
        weights = [min(1.0, bound / norm) if norm else 0.0 for norm in norms(gradients)]
        names = gradients[0]
        self.values = {
            n: torch.stack([w * each[n] for w, each in zip(weights, gradients, strict=True)]).sum(0) for n in names
        }
        self.terms = {
            n: sum(w * float(each[n].norm()) for w, each in zip(weights, gradients, strict=True)) for n in names
        }

    def error(self, found: Mapping[str, Tensor]) -> tuple[float, str]:
        """Returns the largest relative error of one parameter's sum, and the parameter's name.

        A parameter whose gradients are next to nothing beside the others' is all rounding error: the floor is for it.
        """
        floor = 1e-7 * max(self.terms.values())
        worst = (0.0, "")
        for n, value in self.values.items():
            away = float((found[n].double() - value.double()).norm()) / max(self.terms[n], floor, 1e-300)
            worst = max(worst, (away if away == away else float("inf"), n))  # noqa: PLR0124 - NaN
        return worst


def clipped(gradients: Gradients, bound: float) -> Expected:
    """Returns the sum of gradients that are each scaled down to a norm of at most `bound`."""
    return Expected(gradients, bound)
