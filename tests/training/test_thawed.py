"""Parameters that are thawed or added once training is private: exact from their next forward on, at both doors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    register_rule,
)
from privet.clipping import PerLayer
from privet.errors import ConfigurationError, CoverageError, ProtocolError, UnsupportedModelError
from privet.gradients.capture.watched import Roots

pytestmark = pytest.mark.filterwarnings(
    "ignore:a step was taken on a batch that did not come:UserWarning", "ignore:.*noise_multiplier:UserWarning",
    "ignore:.*no noise:UserWarning",
)  # fmt: skip
WIDTH, CLIP = 4, 1.35  # between the norms: some examples are clipped, and some are not


class Net(nn.Module):
    """Two layers and dropout; batch, features and classes coincide. Adapters may be added to the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.adapters = nn.ModuleList()
        self.drop = nn.Dropout(0.0)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        for adapter in self.adapters:
            hidden = hidden + adapter(x)
        return self.head(self.drop(torch.tanh(hidden)))


def adapter() -> nn.Sequential:
    """A LoRA adapter of rank 2, whose second factor begins at zero."""
    made = nn.Sequential(nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)).double()
    nn.init.zeros_(made[1].weight)
    return made


def sgd(net: Net) -> torch.optim.Optimizer:
    """Over all parameters, the frozen ones too: as scripts have it that freeze and unfreeze."""
    return torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)


def loss(net: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


class Paper:
    def __init__(self, net: Net, optimizer: Any = None, *, noise: float = 0.0, **options: Any) -> None:
        data = TensorDataset(torch.randn(16, WIDTH).double(), torch.randint(WIDTH, (16,)))
        self.engine, self.net = PrivacyEngine(), net
        self.net, self.optimizer, self.loader = self.engine.make_private(
            module=net,
            optimizer=optimizer or sgd(net),
            data_loader=DataLoader(data, batch_size=WIDTH),
            noise_multiplier=noise,
            **{"max_grad_norm": CLIP, **options},
        )
        self.ledger = self.engine.ledger

    def __call__(self, batch: Any) -> None:
        loss(self.net, batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Shown(Paper):
    def __init__(self, net: Net, optimizer: Any = None, **options: Any) -> None:
        super().__init__(net, optimizer, grad_sample_mode="hooks", **options)


def explicit(net: Net, optimizer: Any = None, *, noise: float = 0.0, clipping: Any = None, **options: Any) -> Any:
    return PrivateStep(
        net,
        optimizer=optimizer or sgd(net),
        mechanism=Mechanism(sampling=Poisson(0.25), clipping=clipping or Flat(CLIP), noise=Gaussian(noise)),
        loss_per_example=loss,
        expected_batch_size=WIDTH,
        **options,
    )


def two_pass(net: Net, optimizer: Any = None, **options: Any) -> Any:
    return explicit(net, optimizer, performance=Performance(passes=2), **options)


DOORS = {"paper": Paper, "hooks": Shown, "explicit": explicit, "two passes": two_pass}


def batches(steps: int) -> list[Any]:
    made = torch.Generator().manual_seed(1)
    return [
        (torch.randn(WIDTH, WIDTH, generator=made).double(), torch.randint(WIDTH, (WIDTH,), generator=made))
        for _ in range(steps)
    ]


def one_at_a_time(net: Net, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """One ordinary step on the clipped mean, formed by a loop over examples."""
    trained = [p for p in net.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in trained]
    for x, y in zip(*batch, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(net(x[None]), y[None]), trained)
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        for t, g in zip(total, grads, strict=True):
            t.add_(g * min(1.0, CLIP / float(norm)))
    for p, t in zip(trained, total, strict=True):
        p.grad = t / WIDTH
    optimizer.step()
    optimizer.zero_grad()


def change(net: Net, optimizer: torch.optim.Optimizer, what: str) -> None:
    if what in ("thaw", "freeze"):
        net.body.requires_grad_(what == "thaw")
    elif what == "thaw one":
        net.body.bias.requires_grad_(True)
    elif what == "add":
        torch.manual_seed(3)
        net.adapters.append(adapter())
        optimizer.add_param_group({"params": net.adapters[-1].parameters(), "lr": 0.25})


@pytest.mark.parametrize("door", DOORS)
def test_it_trains_as_one_example_at_a_time(door: str) -> None:
    net, other = Net(), Net()
    for each in (net, other):
        each.body.requires_grad_(False)
    run, theirs = DOORS[door](net), sgd(other)
    course = [None, "thaw one", "thaw", "add", "freeze", "add", "thaw", None]
    for what, batch in zip(course, batches(len(course)), strict=True):
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        for each, optimizer in ((net, run.optimizer), (other, theirs)):
            change(each, optimizer, what or "")
        run(batch)
        one_at_a_time(other, theirs, batch)
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9, msg=lambda m, n=name, w=what: f"{n} after {w}: {m}")
            if not p.requires_grad:
                assert torch.equal(p, before[name])
    assert run.ledger.steps == len(course)


@pytest.mark.parametrize("door", DOORS)
def test_noise_covers_it_and_one_example_moves_the_whole_by_the_clip_norm(door: str) -> None:
    def gradient(batch: Any, noise: float) -> dict[str, torch.Tensor]:
        net = Net()
        net.body.requires_grad_(False)
        run = DOORS[door](net, noise=noise)
        run.optimizer.param_groups[0]["lr"] = 0.0
        run(batches(1)[0])
        change(net, run.optimizer, "thaw")
        change(net, run.optimizer, "add")
        found: dict[str, torch.Tensor] = {}
        hook = lambda *rest: found.update({n: p.grad.clone() * WIDTH for n, p in net.named_parameters()})  # noqa: E731
        run.optimizer.register_step_post_hook(hook)
        run(batch)
        return found

    batch = batches(2)[1]
    plain = gradient(batch, 0.0)
    large = (torch.cat([batch[0][:-1], batch[0][-1:] * 1000]), batch[1])
    fewer = (batch[0][:-1], batch[1][:-1])
    for other, most in ((fewer, 1.0), (large, 2.0)):
        moved = gradient(other, 0.0)
        distance = torch.stack([(plain[n] - moved[n]).square().sum() for n in plain]).sum().sqrt()
        assert 0.0 < float(distance) <= most * CLIP * 1.0001
    noisy = gradient(batch, 1.0)
    assert all(bool((plain[n] != noisy[n]).all()) for n in plain)


def test_planted_a_root_that_is_not_taken_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient would be in no norm: the check of the next batch sees it."""
    monkeypatch.setattr(Roots, "add", lambda self, name, parameter: None)
    net = Net()
    net.body.requires_grad_(False)
    run = Paper(net)
    run(batches(1)[0])
    net.body.requires_grad_(True)
    with pytest.raises(CoverageError, match=r"body\."):
        run(batches(2)[1])


@pytest.mark.parametrize("door", DOORS)
def test_what_would_never_be_moved_is_named(door: str) -> None:
    net = Net()
    run = DOORS[door](net)
    net.adapters.append(adapter())
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ConfigurationError, match=r"0\.0\.weight is trainable now .*does not hold.*add_param_group"):
        run(batches(1)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert run.ledger.steps == 0
    run.optimizer.add_param_group({"params": net.adapters.parameters()})
    run(batches(1)[0])
    assert run.ledger.steps == 1


def test_a_layer_in_place_of_another_is_refused_and_made_private_anew() -> None:
    net = Net()
    run = Paper(net)
    run(batches(1)[0])
    net.head = nn.Linear(WIDTH, WIDTH).double()
    run.optimizer.add_param_group({"params": net.head.parameters()})
    with pytest.raises(
        ConfigurationError, match=r"head\.weight is trainable now \(so are head\.bias\).*replaced.*detach"
    ):
        run(batches(1)[0])
    run.engine.detach(net)
    again = Paper(net, sgd(net))
    again(batches(1)[0])


def test_inside_a_step_it_is_refused() -> None:
    net = Net()
    net.body.requires_grad_(False)
    run = Paper(net)
    loss(net, batches(1)[0]).mean().backward()
    net.body.requires_grad_(True)
    with pytest.raises(ProtocolError, match=r"body\.weight, body\.bias became trainable inside a logical step"):
        net(batches(1)[0][0])
    run.optimizer.step()
    assert net.body.weight.grad is None  # it was no part of that sum
    run(batches(1)[0])
    with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=1, optimizer=run.optimizer) as physical:
        for x, y in physical:
            if not physical.last:
                loss(net, (x, y)).mean().backward()
                run.optimizer.step()
                change(net, run.optimizer, "add")
                with pytest.raises(ProtocolError, match="inside a logical step"):
                    net(x)
                return
    raise AssertionError("no logical batch had two parts")


def test_clipping_by_layer_says_that_it_has_no_bound_for_a_new_layer() -> None:
    net = Net()
    net.body.requires_grad_(False)
    step = explicit(net, clipping=PerLayer({"head": CLIP}))
    step(batches(1)[0])
    net.body.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"lacks the layers \['body'\]"):
        step(batches(1)[0])
    several = Net()
    several.body.requires_grad_(False)
    run = explicit(several, clipping=PerLayer(CLIP))
    run(batches(1)[0])
    several.body.requires_grad_(True)
    run(batches(1)[0])
    both = Net()
    both.body.requires_grad_(False)
    passes = two_pass(both, clipping=PerLayer(CLIP))
    passes(batches(1)[0])
    both.body.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="passes=2"):
        passes(batches(1)[0])


def test_a_module_that_mixes_examples_is_refused_when_it_is_added() -> None:
    net = Net()
    run = Paper(net)
    run(batches(1)[0])
    net.adapters.append(nn.BatchNorm1d(WIDTH).double())
    run.optimizer.add_param_group({"params": net.adapters.parameters()})
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d"):
        run(batches(1)[0])


class Scaled(nn.Module):
    """A layer with a rule of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_a_module_with_a_rule_of_the_users_own_is_one_operation_once_it_is_added() -> None:
    calls = []

    @register_rule(Scaled)
    def rule(module: nn.Module, inputs: Any, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(gradient.shape)
        return {"weight": inputs[0] * gradient}

    net, other = Net(), Net()
    run, theirs = Paper(net), sgd(other)
    for each, optimizer in ((net, run.optimizer), (other, theirs)):
        each.adapters.append(Scaled())
        optimizer.add_param_group({"params": each.adapters.parameters()})
    for batch in batches(2):
        run(batch)
        one_at_a_time(other, theirs, batch)
    assert calls
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_a_checkpoint_goes_on_where_the_same_parameters_train(tmp_path: Any) -> None:
    net = Net()
    net.body.requires_grad_(False)
    run = explicit(net)
    run(batches(1)[0])
    net.body.requires_grad_(True)
    run(batches(1)[0])
    run.save_checkpoint(tmp_path / "run.pt")
    again = explicit(Net())  # thawed from the start
    again.load_checkpoint(tmp_path / "run.pt")
    assert again.ledger.steps == 2
    frozen = Net()
    frozen.body.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="parameters: saved"):
        explicit(frozen).load_checkpoint(tmp_path / "run.pt")
