"""Reentrant checkpoints in a private forward: exact as the other kind, and torch's own again when it is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpoints

from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep
from privet.gradients.capture import checkpoints as ours
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, reference

D = 4
REENTRANT = checkpoints.CheckpointFunction


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    """Torch's own name is back after each test, whatever tests before have left in the middle of a step."""
    ours._threads.clear()
    ours.not_reentrant(ours, None)
    yield
    assert checkpoints.CheckpointFunction is REENTRANT


class Net(nn.Module):
    """Layers that share a table made of parameters alone, and rows that a mask takes, all of it computed again."""

    def __init__(self, *, reentrant: bool, nested: bool = False) -> None:
        super().__init__()
        self.table, self.first = nn.Parameter(torch.randn(D, D)), nn.Linear(D, D)
        self.layers, self.chosen = (nn.ModuleList(nn.Linear(D, D) for _ in range(2)) for _ in range(2))
        self.reentrant, self.nested, self.runs, self.dropout = reentrant, nested, 0, nn.Dropout(0.0)

    def block(self, layer: nn.Module, chosen: nn.Module, h: Tensor, bias: Tensor) -> Tensor:
        self.runs += 1
        h = torch.tanh(layer(self.dropout(h)) + bias)
        if self.nested:
            return h + chosen(h)
        rows = h.flatten(0, 1)
        places, out = (rows[:, 0] > 0).nonzero()[:, 0], torch.zeros_like(rows)
        out[places] = chosen(rows[places])
        return h + out.view_as(h)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, D) -> (B, D)
        h, bias = self.first(x), self.table.tanh()
        if self.nested:
            return checkpoints.checkpoint(self.blocks, h, torch.ones_like(bias), use_reentrant=self.reentrant).sum(1)
        return self.blocks(h, bias).sum(1)

    def blocks(self, h: Tensor, bias: Tensor) -> Tensor:
        for layer, chosen in zip(self.layers, self.chosen, strict=True):
            h = checkpoints.checkpoint(self.block, layer, chosen, h, bias, use_reentrant=self.reentrant)
        return h


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().sum(1)


def made() -> tuple[nn.Module, nn.Module, tuple[Tensor]]:
    """Returns a model with reentrant checkpoints, the same with others, and as many examples as positions."""
    torch.manual_seed(0)
    model, twin = Net(reentrant=True).double(), Net(reentrant=False).double()
    twin.load_state_dict(model.state_dict())  # torch.autograd.grad cannot look through a reentrant one
    return model, twin, (torch.randn(D, D, D, dtype=torch.float64),)


@pytest.mark.parametrize("door", DOORS)
def test_a_table_that_layers_share_and_rows_by_a_mask_are_exact(door: str) -> None:
    model, twin, batch = made()
    assert_exact(door_sum(door, model, batch, loss=loss), reference(twin, batch, loss, Flat(1.0)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_a_checkpoint_inside_of_a_checkpoint_is_exact() -> None:
    model, twin, batch = made()
    model.nested = twin.nested = True
    assert_exact(door_sum("explicit", model, batch, loss=loss), reference(twin, batch, loss, Flat(1.0)))


def test_one_example_moves_the_sum_by_the_clip_norm_at_most() -> None:
    model, _, (x,) = made()
    bound = Flat(0.01)
    whole, without, moved = (
        door_sum("explicit", model, (x,), (other,), loss=loss, policy=bound)
        for other in (x, x[:-1], torch.cat([x[:-1], 1000.0 * x[-1:]]))
    )
    assert 0.0 < distance(whole, without) <= 0.01 * (1 + 1e-9)
    assert distance(moved, without) <= 0.01 * (1 + 1e-9)


def step_of(model: nn.Module) -> PrivateStep:
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=Gaussian(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return PrivateStep(model, optimizer=optimizer, mechanism=mechanism, loss_per_example=loss, expected_batch_size=1.0)


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
def test_each_part_runs_twice_with_the_same_dropout() -> None:
    model, _, batch = made()
    model.dropout.p = 0.5
    step = step_of(model)
    step(batch)
    model.runs = 0
    seen: list[Tensor] = []
    handle = model.dropout.register_forward_hook(lambda module, args, out: seen.append(out.detach() == 0))
    step(batch)
    handle.remove()
    assert model.runs == 4
    assert torch.equal(seen[0], seen[3])
    assert torch.equal(seen[1], seen[2])


class Stops(Net):
    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        self.during()
        if self.stops:
            raise KeyboardInterrupt
        return found


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
def test_other_threads_and_forwards_after_one_that_broke_off_have_torchs_own() -> None:
    torch.manual_seed(0)
    model, batch = Stops(reentrant=True).double(), made()[2]
    names: list[str] = []

    def checkpointed() -> None:
        found = checkpoints.checkpoint(torch.tanh, torch.ones(2, requires_grad=True), use_reentrant=True)
        names.append(type(found.grad_fn).__name__)

    def elsewhere() -> None:
        thread = threading.Thread(target=checkpointed)
        thread.start()
        thread.join()

    model.stops, model.during = False, elsewhere
    step = step_of(model)
    step(batch)
    model.stops = True
    with pytest.raises(KeyboardInterrupt):
        step(batch)
    elsewhere()
    checkpointed()
    assert len(names) > 3
    assert set(names) == {"CheckpointFunctionBackward"}
    model.stops = False
    step(batch)
