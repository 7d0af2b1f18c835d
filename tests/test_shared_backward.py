"""Forwards that share a backward: of the same examples, an empty batch never beside one that is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privet import PrivacyEngine, ProtocolError
from tests.contracts.doors import loader, size, taken

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")


def private() -> tuple[nn.Module, torch.optim.Optimizer, PrivacyEngine]:
    net, engine = nn.Linear(3, 2), PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loader(),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        loss_reduction="sum",
    )
    return net, optimizer, engine


@pytest.mark.parametrize("first", [0, 1])
def test_no_examples_and_one_example_never_share_a_backward(first: int) -> None:
    net, optimizer, engine = private()
    seen = taken(net, optimizer)
    one = net(torch.randn(first, 3))
    with pytest.raises(ProtocolError, match=f"forward of {1 - first} examples follows one of {first}"):
        (one.sum() + net(torch.randn(1 - first, 3)).sum()).backward()
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())
    assert engine.ledger.steps == 0
    net(torch.randn(1, 3)).sum().backward()
    optimizer.step()
    assert size(seen[-1]) > 0.9, "the next batch is whole"


@pytest.mark.parametrize("examples", [0, 1])
def test_forwards_of_the_same_size_share_a_backward(examples: int) -> None:
    net, optimizer, _ = private()
    seen = taken(net, optimizer)
    (net(torch.randn(examples, 3)).sum() + net(torch.randn(examples, 3)).sum()).backward()
    optimizer.step()
    assert (size(seen[-1]) > 0.9) == (examples == 1)
