"""Idioms that private training cannot take: the message names the idiom and the way on, and nothing is released."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import privet
from privet import (
    Budget,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
X = torch.randn(4, 3)


class Run:
    def __init__(self, net: nn.Module | None = None, engine: PrivacyEngine | None = None, **options: Any) -> None:
        self.net = nn.Linear(3, 2) if net is None else net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.engine = PrivacyEngine(accountant="rdp") if engine is None else engine
        data = DataLoader(TensorDataset(torch.randn(32, 3)), batch_size=8)
        given = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "data_loader": data, **options}
        self.returned = self.engine.make_private(module=self.net, optimizer=self.optimizer, **given)

    def backward(self, x: Tensor = X) -> None:
        self.net(x).square().mean().backward()


def with_scaler(unscale: bool) -> None:
    run, scaler = Run(), torch.amp.GradScaler("cpu")
    scaler.scale(run.net(X).square().mean()).backward()
    if unscale:
        scaler.unscale_(run.optimizer)
    try:
        scaler.step(run.optimizer)
    finally:
        assert run.engine.ledger.steps == 0
        assert all(p.grad is None for p in run.net.parameters())


def penalty() -> None:
    net, x = Run(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).net, X.clone().requires_grad_(True)
    torch.autograd.grad(net(x).sum(), x, create_graph=True)


def adversarial() -> None:
    run, x = Run(), X.clone().requires_grad_(True)
    run.backward(x)
    run.optimizer.zero_grad()


def adversarial_by_grad() -> None:
    run, x = Run(), X.clone().requires_grad_(True)
    torch.autograd.grad(run.net(x).square().mean(), x)
    run.backward()


def shared_layer() -> None:
    layer = nn.Linear(3, 3)
    Run(nn.Sequential(layer, nn.Linear(3, 2)))
    Run(nn.Sequential(layer, nn.Linear(3, 2)))


def accumulated() -> None:
    run = Run()
    run.backward()
    run.backward()


def through_a_discriminator() -> None:
    run = Run()
    run.backward(nn.Linear(2, 3)(torch.randn(4, 2)))
    run.optimizer.zero_grad()


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, packed: nn.utils.rnn.PackedSequence) -> Tensor:
        return self.out(self.layer(packed)[1][0][-1])


def packed_by_the_loader() -> None:
    sequences = [torch.randn(length, 3) for length in (2, 4, 1)]
    Run(Packed()).backward(nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False))


class OwnLinear(nn.Linear):
    pass


def with_a_rule_of_opacus() -> None:
    @privet.register_rule(OwnLinear)
    def rule(layer: nn.Module, activations: Any, backprops: Tensor) -> Any:
        return {layer.weight: torch.einsum("ni,nj->nij", backprops, activations), layer.bias: backprops}

    Run(OwnLinear(3, 2)).backward()


IDIOMS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "GradScaler": (lambda: with_scaler(unscale=False), ProtocolError, "GradScaler.*bfloat16"),
    "GradScaler with unscale_": (lambda: with_scaler(unscale=True), ProtocolError, "GradScaler.*bfloat16"),
    "a gradient penalty": (penalty, UnsupportedModelError, r"create_graph=True.*penalty"),
    "adversarial inputs": (adversarial, ProtocolError, r"adversarial inputs, belongs in eval\(\)"),
    "adversarial inputs by grad": (adversarial_by_grad, ProtocolError, r"adversarial inputs belongs in eval\(\)"),
    "a generator's step": (through_a_discriminator, ProtocolError, "discriminator.*held fixed"),
    "accumulation": (accumulated, ProtocolError, r"accumulate=k(?s:.*)BatchMemoryManager"),
    "a copy": (lambda: copy.deepcopy(Run().net)(X), ProtocolError, "is a copy.*give the copy to make_private"),
    "the same again": (lambda: Run(Run().net), ProtocolError, r"made private before.*detach\(\)"),
    "a shared layer": (shared_layer, ProtocolError, r"0\.weight, 0\.bias.*one module"),
    "a script": (lambda: Run(torch.jit.script(nn.Linear(3, 2))), UnsupportedModelError, r"torch\.jit\.script"),
    "a packed sequence": (packed_by_the_loader, UnsupportedModelError, "packed sequence.*pack in the forward"),
    "a rule of Opacus": (with_a_rule_of_opacus, UnsupportedModelError, r"rule\(module, inputs, gradient\).*Opacus"),
    "a list of bounds": (lambda: Run(max_grad_norm=[1.0, 1.0]), ConfigurationError, "list of 2.*per_layer"),
    "ghost": (lambda: Run(grad_sample_mode="ghost"), ConfigurationError, "'auto' is ghost clipping"),
    "prv": (lambda: PrivacyEngine(accountant="prv"), ConfigurationError, "'pld' is the numerical one"),
    "four values in another order": (
        lambda: next(iter(Run(criterion=nn.MSELoss()).returned[3])), ConfigurationError, "order module, optimizer",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("idiom", IDIOMS)
def test_the_idiom_is_named_with_the_way_on(idiom: str) -> None:
    act, kind, words = IDIOMS[idiom]
    with pytest.raises(kind, match=f"(?s){words}"):
        act()


def test_a_disabled_scaler_and_a_fused_optimizer_train() -> None:
    run, scaler = Run(), torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(run.net(X).square().mean()).backward()
    scaler.step(run.optimizer)
    assert run.engine.ledger.steps == 1


# -- numbers that protect nobody ---------------------------------------------------------------------------------------


def explicit(noise: float = 1.0, clip: float = 1.0, **options: Any) -> PrivateStep:
    net = nn.Linear(3, 2)
    return PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(clip), noise=Gaussian(noise), steps=4),
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
        **options,
    )


def paper(noise: float = 1.0, clip: float = 1.0, **options: Any) -> PrivacyEngine:
    return Run(engine=PrivacyEngine(accountant="rdp", **options), noise_multiplier=noise, max_grad_norm=clip).engine


DOORS = {"paper": paper, "explicit": explicit}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"noise": 0.0}, "without noise, and ε is infinite"),
        ({"noise": 0.01}, r"one step costs an ε of up to 5e\+03"),
        ({"noise": 1e5}, "steps are noise alone"),
        ({"clip": 1e15}, "no gradient comes near"),
    ],
    ids=str,
)
def test_absurd_numbers_are_said_at_both_doors(door: str, numbers: dict[str, float], words: str) -> None:
    options = {"expected_batch_size": 8} if door == "explicit" else {}
    with pytest.warns(UserWarning, match=words):
        made = DOORS[door](**numbers, **options)
    assert made.epsilon(1e-5) == 0.0


@pytest.mark.parametrize("door", DOORS)
def test_a_budget_without_noise_is_refused(door: str) -> None:
    with pytest.raises(ConfigurationError, match="no step would fit"):
        DOORS[door](noise=0.0, budget=Budget(3.0, 1e-5))


@pytest.mark.parametrize("door", DOORS)
def test_a_delta_of_one_over_n_is_said_once(door: str) -> None:
    made = DOORS[door]()
    if isinstance(made, PrivateStep):
        made.batches(TensorDataset(torch.randn(32, 3)))
    with pytest.warns(UserWarning, match=r"1/n or more, with n = 32.*0\.003 or less"):
        made.epsilon(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.get_epsilon(0.1)
        DOORS[door]().epsilon(1e-3)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_target_that_is_none_is_refused(delta: float) -> None:
    net = nn.Linear(3, 2)
    optimizer, data = torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(TensorDataset(X), batch_size=2)
    with pytest.raises(ConfigurationError, match="target_delta"):
        PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=net, optimizer=optimizer, data_loader=data, target_epsilon=3.0, target_delta=delta, epochs=1,
            max_grad_norm=1.0,
        )  # fmt: skip
    for made in (paper(), explicit()):
        with pytest.raises(ConfigurationError, match="delta"):
            made.set_budget(epsilon=1.0, delta=delta)


def test_a_target_delta_of_one_over_n_is_said() -> None:
    net = nn.Linear(3, 2)
    optimizer, data = torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(TensorDataset(X), batch_size=2)
    with pytest.warns(UserWarning, match="target_delta = 0.3 is 1/n or more, with n = 4"):
        PrivacyEngine(accountant="rdp").make_private_with_epsilon(
            module=net, optimizer=optimizer, data_loader=data, target_epsilon=3.0, target_delta=0.3, epochs=1,
            max_grad_norm=1.0,
        )  # fmt: skip
    with pytest.raises(ConfigurationError, match="delta is 1"):
        Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=Gaussian(1.0)).calibrated(epsilon=1.0, delta=1.0)
