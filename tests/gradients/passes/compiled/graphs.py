"""Compiled steps for tests: with graphs run as they were traced, which is what most tests are about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivateStep
from tests.contracts.doors import copied, taken, trainable
from tests.gradients.rule_cases import loss as case_loss


def step_of(
    module: nn.Module,
    *,
    loss: Any = case_loss,
    policy: Any = None,
    noise: float = 0.0,
    graph: bool = True,
    size: int | None = 5,
    rate: float = 0.0,
    **options: Any,
) -> PrivateStep:
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=policy or Flat(0.1), noise=Gaussian(noise))
    optimizer = torch.optim.SGD(trainable(module), lr=rate)
    return PrivateStep(
        module,
        optimizer=optimizer,
        mechanism=mechanism,
        loss_per_example=loss,
        expected_batch_size=1,
        performance=Performance(compile=graph, physical_batch_size=size),
        **options,
    )


def sums_of(module: nn.Module, *batches: Any, **options: Any) -> list[dict[str, Tensor]]:
    """Returns the sum of each batch, in turn."""
    module = copied(module)
    step = step_of(module, **options)
    seen = taken(module, step.optimizer)
    for batch in batches:
        step(batch)
    return seen
