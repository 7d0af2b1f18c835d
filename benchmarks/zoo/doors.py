"""The clipped sums of privet, at either door: no noise, and a learning rate of zero."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.zoo.case import Batch, Case
from benchmarks.zoo.plain import seeded
from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep

__all__ = ["DOORS", "Asked", "moved_by", "sums"]

DOORS = ("paper", "explicit")
Sum = dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """One step: the batch, the weight of each example's loss (none: all 1), and what the generator starts with."""

    batch: Batch
    weights: Tensor | None = None
    seed: int = 0


def sums(door: str, case: Case, model: nn.Module, steps: Sequence[Asked], bound: float) -> list[Sum]:
    """Returns the clipped sum of each step: one private model takes them all, in this order."""
    model = copy.deepcopy(model)
    if case.prepare is not None:
        case.prepare(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    seen: list[Sum] = []

    def look(*rest: Any) -> None:
        seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def losses(model: nn.Module, batch: Any) -> Tensor:
        inner, weights = batch
        return case.loss(model, inner) * weights

    if door == "paper":
        PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(torch.zeros(16, 2)), batch_size=4),
            noise_multiplier=0.0,
            max_grad_norm=bound,
            loss_reduction="sum",
        )
        step: Any = None
    else:
        step = PrivateStep(
            model,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(0.1), clipping=Flat(bound), noise=Gaussian(0.0)),
            loss_per_example=losses,
            expected_batch_size=1.0,
            performance=Performance(**dict(case.way)),
        )
    optimizer.register_step_post_hook(look)
    for each in steps:
        floating = next((p.dtype for p in parameters if p.is_floating_point()), torch.float64)
        weights = torch.ones(len(each.batch[0]), dtype=floating) if each.weights is None else each.weights
        seeded(each.seed)
        if step is not None:
            step((each.batch, weights))
            continue
        optimizer.zero_grad()
        losses(model, (each.batch, weights)).sum().backward()
        optimizer.step()
    return seen


def moved_by(a: Sum, b: Sum) -> float:
    """Returns the Euclidean distance of two sums."""
    return float(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)) ** 0.5
