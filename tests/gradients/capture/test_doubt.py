"""An operation that was never looked at, or whose layouts do not decide: the batch is looked at, nothing is guessed."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError, Flat, Performance, PrivateStep, UnsupportedModelError
from tests.contracts.doors import assert_exact, explicit_sum, paper_sum, reference

D = 3
WAYS: dict[str, dict[str, Any]] = {
    "paper": {},
    "hooks": {"grad_sample_mode": "hooks"},
    "functorch": {"grad_sample_mode": "functorch"},
    "explicit": {},
    "two passes": {"passes": 2},
    "padded": {"physical_batch_size": 7, "padded": True},
    "physical": {"physical_batch_size": 3},
}


def way_sum(way: str, module: nn.Module, *batches: Any, loss: Any, policy: Any) -> dict[str, Tensor]:
    door = paper_sum if way in ("paper", "hooks", "functorch") else explicit_sum
    return door(module, *batches, loss=loss, policy=policy, **WAYS[way])


def squares(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
    return m(*b).square().flatten(1).sum(1)


class Late(nn.Module):
    """Sequence first inside: from a call on, one layer more, which sees (T, B, D)."""

    def __init__(self, since: int = 1) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.use = False

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        h = self.first(x).transpose(0, 1)
        if self.use:
            h = self.late(h.tanh())
        return self.last(h.transpose(0, 1).mean(1))


def switched(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch whose second tensor says whether the late layer takes part."""
    m.use = bool(b[1].any())
    return m(b[0]).square().sum(1)


def batch(n: int, t: int, *, late: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, torch.full((n,), float(late))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("t", [5, 7])
def test_a_layer_met_late_with_as_many_positions_as_examples_is_looked_at(way: str, t: int) -> None:
    net = Late().double()
    second = batch(7, t, late=True, seed=1)
    found = way_sum(way, net, batch(6, t, late=False), second, second, loss=switched, policy=Flat(0.5))
    assert_exact(found, reference(net, second, switched, Flat(0.5)))
