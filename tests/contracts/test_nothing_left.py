"""Law 6: no ordinary weight gradient is computed, none is stored, and nothing of a step is kept."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from privet import Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from tests.contracts.doors import DOORS, loader

SHAPES = {"0.weight": (6, 1, 3, 3), "3.weight": (7, 24)}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 4, 7), nn.Tanh(), nn.Linear(7, 3))


def batch() -> tuple[Tensor]:
    return (torch.randn(5, 1, 4, 4),)


class Shapes(TorchDispatchMode):
    """Counts the operations whose result has as many entries as a weight, in the weight's shape up to order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {name: [] for name in SHAPES}
        self.masked: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "convolution_backward" in str(func):
            self.masked.append(tuple(args[-1]))
        made = str(func).split(".")[1]
        if made in {"mm", "addmm", "bmm", "convolution_backward", "einsum", "mul", "sum"}:
            for leaf in tree_leaves(result):
                for name, shape in SHAPES.items():
                    if isinstance(leaf, Tensor) and leaf.numel() == torch.Size(shape).numel():
                        self.found[name].append(made)
        return result


def private(model: nn.Module) -> tuple[torch.optim.Optimizer, PrivacyEngine]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
    )
    return optimizer, engine


def ordinary(model: nn.Module) -> Shapes:
    with Shapes() as seen:
        model(*batch()).square().sum().backward()
    return seen


def test_the_counter_sees_an_ordinary_weight_gradient() -> None:
    seen = ordinary(net())
    assert any(mask[1] for mask in seen.masked)
    assert "mm" in seen.found["3.weight"]


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
def test_backward_forms_no_weight_gradient_and_the_sum_is_formed_once() -> None:
    model = net()
    optimizer, _ = private(model)
    for _ in range(2):  # the first pays for the check, whose gradients are compared and dropped
        optimizer.zero_grad()
        output = model(*batch()).square().mean()
        with Shapes() as seen:
            output.backward()
        optimizer.step()
    assert not any(mask[1] or mask[2] for mask in seen.masked), "convolution_backward was asked for a weight's gradient"
    products = {"mm", "addmm", "bmm", "einsum", "convolution_backward"}
    for name, made in seen.found.items():
        assert len([m for m in made if m in products]) <= 1, f"{name}: {made}"


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
def test_no_parameter_has_a_gradient_between_zero_grad_and_step() -> None:
    model = net()
    optimizer, _ = private(model)
    for _ in range(3):
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        output = model(*batch())
        assert all(p.grad is None for p in model.parameters())
        output.square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())


def alive() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), Tensor)]


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
@pytest.mark.parametrize("door", DOORS)
def test_nothing_of_a_step_is_kept(door: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if door == "paper":
        PrivacyEngine(accountant="rdp").make_private(
            module=model, optimizer=optimizer, data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
        )

        def step(rows: tuple[Tensor]) -> None:
            optimizer.zero_grad()
            model(*rows).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        mechanism = Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=Gaussian(1.0))
        private_step = PrivateStep(
            model,
            optimizer=optimizer,
            mechanism=mechanism,
            loss_per_example=lambda m, b: m(*b).square().sum(1),
            expected_batch_size=5,
        )

        def step(rows: tuple[Tensor]) -> None:
            private_step(rows)

    for _ in range(2):
        step(batch())
    before = len(alive())
    rows = batch()
    examples = weakref.ref(rows[0])
    step(rows)
    del rows
    gc.collect()
    assert examples() is None, "something holds the examples"
    step(batch())
    assert len(alive()) <= before + 1, "tensors pile up"
    assert all(p.grad is None for p in model.parameters())


def test_a_whole_private_epoch_reads_no_realised_batch_size_as_a_divisor() -> None:
    """Law 7: with σ = 0 and one gradient for all, the update is proportional to the size of the batch."""
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(12, 1)), batch_size=4)
    _, _, private_loader = PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=0.5
    )
    sizes = set()
    for (x,) in itertools.chain.from_iterable(private_loader for _ in range(4)):
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (100.0 * model(x)).mean().backward() if len(x) else model(x).sum().backward()
            optimizer.step()
        assert model.weight.grad is not None
        assert float(model.weight.grad) == pytest.approx(0.5 * len(x) / 4, rel=1e-5)
        sizes.add(len(x))
    assert len(sizes) > 2
