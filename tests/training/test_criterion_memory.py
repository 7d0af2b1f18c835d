"""A criterion that remembers earlier examples is refused, and nothing of what it wrote stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import ConfigurationError
from privet.training.criterion import PrivateCriterion


def split(criterion: Any) -> PrivateCriterion:
    return PrivateCriterion(criterion, reduction="mean", examples=lambda: None)


class Rescaled(nn.Module):
    """Divides the loss by a moving average, kept in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("mean", torch.ones(()))
        self.calls = 0
        self.note = 1.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(x, y)
        self.calls += 1
        with torch.no_grad():
            if self.way == "assigned":  # under vmap, a tensor of vmap's own is left behind
                self.mean = 0.9 * self.mean + 0.1 * loss.detach()
            elif self.way == "written":
                self.mean.copy_(0.9 * self.mean + 0.1 * loss.detach())
            elif self.way == "number":  # looks at values, and so runs one example after the other
                self.note = 0.9 * self.note + 0.1 * float(loss)
        return loss / self.mean / self.note


@pytest.mark.parametrize("examples", [1, 2, 5])
@pytest.mark.parametrize(("way", "name"), [("assigned", "mean"), ("written", "mean"), ("number", "note")])
def test_a_criterion_that_keeps_an_average_is_refused_and_put_back(way: str, name: str, examples: int) -> None:
    inner = Rescaled(way)
    mean = inner.mean
    x = torch.randn(examples, 3, requires_grad=True)
    with pytest.raises(ConfigurationError, match="remembers examples") as caught:
        split(inner)(x, torch.randn(examples, 3))
    assert f"criterion.{name}" in str(caught.value)
    assert inner.mean is mean
    assert (float(mean), inner.note, inner.calls) == (1.0, 1.0, 0)


def test_memory_that_nobody_can_see_is_found_by_calling_again() -> None:
    memory = [1.0]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        memory.append(float(F.mse_loss(x, y)))
        return F.mse_loss(x, y) / memory[-2]

    with pytest.raises(ConfigurationError, match="called again"):
        split(loss)(torch.randn(3, 2), torch.randn(3, 2))


def test_memory_that_begins_later_is_found_on_the_schedule() -> None:
    inner = Rescaled("none")
    criterion = split(inner)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    criterion(x, y)
    inner.way = "written"
    for _ in range(6):
        criterion(x, y)
    with pytest.raises(ConfigurationError, match=r"criterion\.mean"):
        criterion(x, y)


@pytest.mark.parametrize(
    "inner",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.rand(3), reduction="sum"),
        Rescaled("none"),
        nn.BCEWithLogitsLoss(),
        nn.BCELoss(),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_a_criterion_without_memory_is_left_as_it_is(inner: nn.Module) -> None:
    floats = isinstance(inner, nn.BCEWithLogitsLoss | nn.BCELoss | Rescaled)
    x, y = torch.rand(4, 3), torch.rand(4, 3) if floats else torch.tensor([0, 2, 1, 1])
    criterion = split(inner)
    for _ in range(9):
        state = torch.get_rng_state()
        criterion(x, y)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_criterion_that_draws_is_not_taken_for_one_that_remembers() -> None:
    def noisy(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(F.dropout(x), y)

    split(noisy)(torch.randn(4, 3), torch.randn(4, 3))
