"""Runs by both doors that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.clipping import ClippingPolicy
from privet.noise import Noise


class Run:
    """A run by either door over 40 examples, five steps a pass.

    Args:
        door: `"paper"` or `"explicit"`.
        make: makes the optimizer.
        seed: of weights and data. Batches and noise are the same for all seeds, so that one run may resume another.
    """

    def __init__(
        self,
        door: str,
        make: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        noise: Noise | None = None,
        clipping: ClippingPolicy | None = None,
        net: nn.Module | None = None,
        steps: int = 5,
        seed: int = 1,
    ) -> None:
        noise, clipping = noise or Gaussian(2.0), clipping or Flat(1.5)
        torch.manual_seed(seed)
        self.net = nn.Linear(3, 2) if net is None else net
        data = TensorDataset(torch.randn(40, 3))
        self.optimizer, self.door_name = make(self.net), door
        generator = torch.Generator().manual_seed(7)
        self.door: Any
        if door == "paper":
            self.door = PrivacyEngine()
            *_, self.loader = self.door.make_private(
                module=self.net,
                optimizer=self.optimizer,
                data_loader=DataLoader(data, batch_size=8),
                noise_multiplier=noise.multiplier,
                noise=noise,
                clipping=clipping,
                noise_generator=generator,
            )
        else:
            self.door = PrivateStep(
                self.net,
                optimizer=self.optimizer,
                mechanism=Mechanism(sampling=Poisson(0.2), clipping=clipping, noise=noise, steps=steps),
                loss_per_example=lambda m, b: m(b[0]).square().sum(1),
                noise_generator=generator,
            )
            self.loader = self.door.batches(data)

    def step(self, batch: Any) -> None:
        if self.door_name == "explicit":
            self.door(batch)
            return
        self.optimizer.zero_grad()
        self.net(batch[0]).square().sum(1).mean().backward()
        self.optimizer.step()

    def train(self) -> Run:
        for batch in self.loader:
            self.step(batch)
        return self

    @property
    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.net.parameters()]


@pytest.fixture(params=["paper", "explicit"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_run() -> type[Run]:
    return Run
