"""Two private networks that share a layer: each sum has the layer's gradient of its own loss, and both are billed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.errors import CoverageError, ProtocolError
from privet.gradients.capture.tripwire import Tripwires

pytestmark = pytest.mark.filterwarnings(
    "ignore:a step was taken on a batch that did not come:UserWarning", "ignore:.*noise_multiplier:UserWarning",
    "ignore:.*no noise:UserWarning",
)  # fmt: skip
WIDTH = 4
CLIP = 1.5  # between the norms: some examples are clipped, and some are not


def two(double: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """Two heads on one layer; batch, features and classes coincide."""
    torch.manual_seed(0)
    shared = nn.Linear(WIDTH, WIDTH)
    nets = [nn.Sequential(shared, nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(2)]
    return tuple(n.double() for n in nets) if double else tuple(nets)  # type: ignore[return-value]


def batches(steps: int = 3) -> list[Any]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(WIDTH, WIDTH, generator=made).double(), torch.randint(WIDTH, (WIDTH,), generator=made))
        for _ in range(steps)
    ]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)


def private(engine: PrivacyEngine, net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    loader = DataLoader(TensorDataset(torch.randn(16, WIDTH).double(), torch.zeros(16).long()), batch_size=WIDTH)
    options = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, **options}
    return engine.make_private(module=net, optimizer=sgd(net), data_loader=loader, **options)[1]


def explicit(net: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> PrivateStep:
    return PrivateStep(
        net,
        optimizer=sgd(net) if optimizer is None else optimizer,
        mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(CLIP), noise=Gaussian(0.0)),
        loss_per_example=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="none"),
        **{"expected_batch_size": WIDTH, **options},
    )


def one_at_a_time(net: nn.Module, batch: Any) -> None:
    """Puts the clipped mean into p.grad, by a loop over examples."""
    total = [torch.zeros_like(p) for p in net.parameters()]
    for x, y in zip(*batch, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), list(net.parameters()))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for t, g in zip(total, grads, strict=True):
            t.add_(g * min(1.0, CLIP / float(norm)))
    for p, t in zip(net.parameters(), total, strict=True):
        p.grad = t / WIDTH


def assert_same(nets: Any, others: Any) -> None:
    for net, other in zip(nets, others, strict=True):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("door", ["paper", "explicit", "one of each"])
def test_each_sum_is_that_of_its_own_loss(door: str) -> None:
    nets, others = two(), two()
    engine = PrivacyEngine()
    acts = []
    for place, net in enumerate(nets):
        if door == "explicit" or (door == "one of each" and place):
            acts.append(explicit(net, ledger=engine.ledger))
            continue
        optimizer = private(engine, net)

        def act(batch: Any, net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        acts.append(act)
    theirs = [sgd(other) for other in others]
    for batch in batches():
        for act, other, optimizer in zip(acts, others, theirs, strict=True):
            act(batch)
            one_at_a_time(other, batch)
            optimizer.step()
    assert_same(nets, others)
    assert engine.ledger.steps == 6


def test_sums_that_wait_side_by_side_are_each_released_by_their_own_step() -> None:
    nets, others = two(), two()
    engine = PrivacyEngine()
    optimizers, theirs = [private(engine, net) for net in nets], [sgd(other) for other in others]
    for batch in batches():
        for net in nets:
            F.cross_entropy(net(batch[0]), batch[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
        kept = []
        for other in others:
            one_at_a_time(other, batch)
            kept.append([p.grad for p in other.parameters()])
        for other, grads, optimizer in zip(others, kept, theirs, strict=True):
            for p, g in zip(other.parameters(), grads, strict=True):
                p.grad = g
            optimizer.step()
    assert_same(nets, others)


def test_one_example_moves_each_sum_by_the_clip_norm_at_most() -> None:
    def moved(batch: Any) -> list[list[torch.Tensor]]:
        nets, engine, found = two(), PrivacyEngine(), []
        for net in nets:
            optimizer = private(engine, net)
            optimizer.param_groups[0]["lr"] = 0.0
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            optimizer.step()
            found.append([p.grad * WIDTH for p in net.parameters()])
        return found

    batch = batches()[0]
    large = (torch.cat([batch[0][:-1], batch[0][-1:] * 1000]), batch[1])
    fewer = (batch[0][:-1], batch[1][:-1])
    for other in (large, fewer):
        scale = 1.0 if other is fewer else 2.0
        for mine, theirs in zip(moved(batch), moved(other), strict=True):
            distance = torch.stack([(a - b).square().sum() for a, b in zip(mine, theirs, strict=True)]).sum().sqrt()
            assert 0.0 < float(distance) <= scale * CLIP * 1.0001


def test_one_backward_through_both_is_refused_with_the_way_on() -> None:
    nets, engine = two(), PrivacyEngine()
    for net in nets:
        private(engine, net)
    x, _ = batches()[0]
    nets[0](x)
    with pytest.raises(ProtocolError, match=r"0\.\w+ is shared with another private module.*ModuleDict"):
        nets[1](x)


@pytest.mark.parametrize("why", ["two engines", "a mode that shows gradients", "one inside of the other", "two steps"])
def test_what_would_not_be_exact_is_refused_at_once(why: str) -> None:
    first, second = two()
    engine = PrivacyEngine()
    if why == "two steps":
        explicit(first)
        with pytest.raises(ProtocolError, match=r"a ledger of its own.*ledger="):
            explicit(second)
        return
    private(engine, first)
    if why == "one inside of the other":
        with pytest.raises(ProtocolError, match="parts of the module were made private before"):
            private(engine, nn.Sequential(first, nn.Linear(WIDTH, WIDTH).double()))
        with pytest.raises(ProtocolError, match="is a part of one that was made private"):
            private(engine, first[2])
    elif why == "two engines":
        with pytest.raises(ProtocolError, match="a ledger of its own"):
            private(PrivacyEngine(), second)
    else:
        with pytest.raises(ProtocolError, match="modes that show"):
            private(engine, second, grad_sample_mode="hooks")


def test_two_steps_on_one_model_have_an_optimizer_each() -> None:
    net = two()[0]
    first = explicit(net)
    second = explicit(net, ledger=first.ledger)
    before = [p.detach().clone() for p in net.parameters()]
    for batch in batches(2):
        first(batch)
        second(batch)
    assert first.ledger.steps == 4
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_a_gradient_by_another_way_is_found_whichever_network_sees_it_first() -> None:
    nets, engine = two(), PrivacyEngine()
    optimizers = [private(engine, net) for net in nets]
    x, y = batches()[0]
    for net, optimizer in zip(nets, optimizers, strict=True):
        penalty = nets[0][0].weight.square().sum()
        with pytest.raises(CoverageError, match=r"0\.weight"):
            (F.cross_entropy(net(x), y) + penalty).backward()
        assert all(p.grad is None for p in net.parameters())
        with pytest.raises(ProtocolError, match="no backward"):
            optimizer.step()


def test_planted_tripwires_that_take_what_is_for_another_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tripwires, "collects", lambda self, parameter: False)
    nets, engine = two(), PrivacyEngine()
    for net in nets:
        private(engine, net)
    x, y = batches()[0]
    with pytest.raises(CoverageError):
        F.cross_entropy(nets[1](x), y).backward()
