"""What the modes that show per-example gradients leave on the parameters, after the module's own `zero_grad`."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from privet import PrivacyEngine, ProtocolError
from tests.contracts.doors import loader

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
SHOWN = ("grad", "grad_sample", "summed_grad")


class Net(nn.Linear):
    """Counts the calls of its own `zero_grad`."""

    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        type(self).calls += 1
        super().zero_grad(set_to_none)


def private(mode: str) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loader(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    return net, optimizer


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_the_modules_zero_grad_clears_what_the_optimizers_does(mode: str) -> None:
    net, optimizer = private(mode)
    net(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert all(getattr(p, name) is not None for p in net.parameters() for name in SHOWN)
    calls = Net.calls
    net.zero_grad()
    assert Net.calls == calls + 1, "the user's own still runs"
    assert all(getattr(p, name) is None for p in net.parameters() for name in SHOWN)
    net(torch.randn(4, 3)).square().mean().backward()
    with pytest.raises(ProtocolError, match="between backward and step"):
        net.zero_grad()
    optimizer.step()
    net.zero_grad(set_to_none=False)
    assert all(p.grad_sample is None for p in net.parameters())


def test_a_copy_clears_itself_and_nothing_else() -> None:
    net, optimizer = private("hooks")
    net(torch.randn(4, 3)).square().mean().backward()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        twin.zero_grad()
        assert all(p.grad is None for p in twin.parameters())
        assert all(p.grad_sample is not None for p in net.parameters())
    optimizer.step()


def test_the_default_mode_leaves_the_modules_zero_grad_alone() -> None:
    net, _ = private("auto")
    assert "zero_grad" not in vars(net)
    assert not any(hasattr(p, "grad_sample") for p in net.parameters())
