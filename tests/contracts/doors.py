"""One clipped sum, by each door: σ = 0, a batch of one's own, and what the optimizer was handed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep
from privet.clipping import ClippingPolicy
from privet.gradients.reference import example_gradients, reference_sum

Loss = Callable[[nn.Module, Any], Tensor]  # per example, (B,)
DOORS = ("paper", "explicit")
torch.set_num_threads(1)  # small models: more threads cost more than they bring


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def copied(module: nn.Module) -> nn.Module:
    """Returns a copy without what earlier forwards left as attributes, which torch cannot copy."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                delattr(part, name)
    return copy.deepcopy(module)


def loader(n: int = 16, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(n, 2), torch.zeros(n)), batch_size=batch_size, **options)


def taken(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Returns a list to which every step of the optimizer appends the gradients that it saw."""
    seen: list[dict[str, Tensor]] = []

    def look(*rest: Any) -> None:
        seen.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    optimizer.register_step_post_hook(look)
    return seen


def paper_sum(
    module: nn.Module, *batches: Any, loss: Loss, policy: ClippingPolicy, **options: Any
) -> dict[str, Tensor]:
    """Returns the sum of the last batch; the ones before are trained on first, with a learning rate of zero."""
    module = copied(module)
    optimizer = torch.optim.SGD(trainable(module), lr=0.0)
    PrivacyEngine(accountant="rdp").make_private(
        module=module,
        optimizer=optimizer,
        data_loader=loader(),
        noise_multiplier=0.0,
        max_grad_norm=policy.sensitivity,
        clipping=policy,
        loss_reduction="sum",
        **options,
    )
    seen = taken(module, optimizer)
    for batch in batches:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a step was taken on a batch")
            loss(module, batch).sum().backward()
            optimizer.step()
    return seen[-1]


def explicit_sum(
    module: nn.Module, *batches: Any, loss: Loss, policy: ClippingPolicy, **options: Any
) -> dict[str, Tensor]:
    """Returns the sum of the last batch; the ones before are trained on first, with a learning rate of zero."""
    module = copied(module)
    optimizer = torch.optim.SGD(trainable(module), lr=0.0)
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(0.0))
    step = PrivateStep(
        module,
        optimizer=optimizer,
        mechanism=mechanism,
        loss_per_example=loss,
        expected_batch_size=1.0,
        performance=Performance(**options),
    )
    seen = taken(module, optimizer)
    for batch in batches:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="a step was taken on a batch")
            step(batch)
    return seen[-1]


def door_sum(
    door: str, module: nn.Module, *batches: Any, loss: Loss, policy: ClippingPolicy | None = None
) -> dict[str, Tensor]:
    policy = Flat(1.0) if policy is None else policy
    return (paper_sum if door == "paper" else explicit_sum)(module, *batches, loss=loss, policy=policy)


class Expected(dict[str, Tensor]):
    """A sum that a test expects, and `terms`: the norms of what was added up, summed over the examples.

    Rounding errors are relative to the terms. The sum itself can be far smaller: terms of opposite sign cancel, and
    what is left of them is then all rounding error, which differs from machine to machine.
    """

    def __init__(self, values: Mapping[str, Tensor], *, terms: float) -> None:
        super().__init__(values)
        self.terms = terms


def expected_sum(gradients: Mapping[str, Tensor], policy: ClippingPolicy) -> Expected:
    """Returns the clipped sum of per-example gradients `(B, *shape)`; the sum over one example alone is its term."""
    units = len(next(iter(gradients.values())))
    rows = ({name: g[i : i + 1] for name, g in gradients.items()} for i in range(units))
    return Expected(reference_sum(gradients, policy), terms=sum(size(reference_sum(row, policy)) for row in rows))


def reference(module: nn.Module, batch: tuple[Tensor, ...], loss: Loss, policy: ClippingPolicy) -> Expected:
    """Returns the same sum by one backward for each example."""
    rows = [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[0]))]
    return expected_sum(example_gradients(module, rows, lambda m, b: loss(m, b).sum()), policy)


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Returns the Euclidean distance of two sums, over all parameters at once."""
    assert set(a) == set(b)
    return float(sum((a[n].double() - b[n].double()).square().sum() for n in a)) ** 0.5


def size(a: Mapping[str, Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in a.values())) ** 0.5


def relative_error(found: Mapping[str, Tensor], expected: Expected) -> float:
    """Returns the distance of two sums over the sizes of the terms: see `Expected`."""
    return distance(found, expected) / max(expected.terms, 1e-30)


def assert_exact(found: Mapping[str, Tensor], expected: Expected, *, tolerance: float | None = None) -> None:
    """Asserts that the sums differ by rounding errors alone: by default 1e-9 of the terms, or 1e-4 in float32."""
    if tolerance is None:
        tolerance = 1e-9 if {t.dtype for t in found.values()} == {torch.float64} else 1e-4
    assert relative_error(found, expected) <= tolerance
