"""The law: clipped sums by micro-batches, one example at a time with plain autograd. Slow, and plainly right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privet.gradients.weights import Policy

__all__ = ["example_gradients", "reference_sum"]


def example_gradients(
    module: nn.Module, examples: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:  # name -> (B, *shape)
    """Returns every example's gradient of its own loss.

    Args:
        module: the model.
        examples: one batch of size 1 each.
        loss: the scalar loss of one such batch.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for example in examples:
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss(module, example), list(parameters.values()), allow_unused=True
        )
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {
        name: torch.stack(r) if r else parameters[name].new_zeros(0, *parameters[name].shape)
        for name, r in rows.items()
    }


def reference_sum(gradients: Mapping[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    """Returns the clipped sum of per-example gradients `(B, *shape)`, in float64."""
    names = list(gradients)
    groups = policy.groups(names)
    rows = {name: g.double() for name, g in gradients.items()}
    units = len(next(iter(rows.values())))
    squared = torch.zeros(max(groups) + 1, units, dtype=torch.float64)
    for name, group in zip(names, groups, strict=True):
        squared[group] += rows[name].square().reshape(units, math.prod(rows[name].shape[1:])).sum(1)
    finite = squared.isfinite().all(0)
    weights = policy.weights(squared.masked_fill(~finite, 0.0)) * finite
    return {
        name: torch.einsum("b,b...->...", weights[group], rows[name].nan_to_num(0.0, 0.0, 0.0))
        for name, group in zip(names, groups, strict=True)
    }
