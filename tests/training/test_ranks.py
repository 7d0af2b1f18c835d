"""Several processes, or wrappers for several devices, are refused by name at both doors until they are supported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep

DATA = TensorDataset(torch.zeros(16, 2))


def private(door: str, module: nn.Module) -> Any:
    """Makes a module private, and returns a function that takes one step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if door == "explicit":
        step = PrivateStep(
            module,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0)),
            loss_per_example=lambda m, b: m(b[0]).sum(1),
        )
        batches = step.batches(DATA)
        return lambda: step(next(iter(batches)))
    *_, loader = PrivacyEngine().make_private(
        module=module,
        optimizer=optimizer,
        data_loader=DataLoader(DATA, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )

    def take() -> None:
        module(next(iter(loader))[0]).mean().backward()
        optimizer.step()

    return take


@pytest.fixture(params=["paper", "explicit"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def group_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: size)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *group: 0)


def test_one_of_several_processes_is_refused_before_and_in_training(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group_of(monkeypatch, 1)
    net = nn.Linear(2, 1)
    step = private(door, net)
    step()
    group_of(monkeypatch, 2)
    before = net.weight.detach().clone()
    with pytest.raises(ConfigurationError, match=r"one of 2 of a torch\.distributed group"):
        step()
    assert torch.equal(before, net.weight)
    with pytest.raises(ConfigurationError, match="Expected one process"):
        private(door, nn.Linear(2, 1))


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_wrapper_is_refused_by_its_name(door: str, where: str) -> None:
    wrapped: nn.Module = nn.DataParallel(nn.Linear(2, 1))
    if where == "inside":
        wrapped = nn.Sequential(wrapped)
    with pytest.raises(ConfigurationError, match="DataParallel: it splits each batch"):
        private(door, wrapped)
    for name in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"):
        kind = type(name, (nn.Linear,), {})
        with pytest.raises(ConfigurationError, match=f"is a {name}"):
            private(door, kind(2, 1))
