"""Policies through both doors: by name and as objects, calibrated, of a user's own, and turned bad in mid-run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Performance, Poisson, PrivacyEngine, PrivateStep
from privet.clipping import PSAC, Automatic, ClippingPolicy, GroupWise, PerLayer
from tests.contracts.doors import assert_exact, copied, explicit_sum, paper_sum, reference
from tests.gradients.policies import POLICIES

MODES = ("auto", "hooks", "functorch")
BY_NAME = {"flat": Flat, "per_layer": PerLayer, "automatic": Automatic, "psac": PSAC}

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return module(batch[0]).square().sum(1)


def batch_of(n: int = 5) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64),)


def data_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(16, 3).double()), batch_size=4)


# -- through both doors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_clips_at_the_papers_door_as_the_reference_does(name: str, mode: str) -> None:
    model, policy = net(), POLICIES[name](net(), 0.3)
    found = paper_sum(model, batch_of(), loss=loss, policy=policy, grad_sample_mode=mode)
    assert_exact(found, reference(model, batch_of(), loss, policy))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_clips_at_the_explicit_door_as_the_reference_does(name: str) -> None:
    model, policy = net(), POLICIES[name](net(), 0.3)
    assert_exact(explicit_sum(model, batch_of(), loss=loss, policy=policy), reference(model, batch_of(), loss, policy))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_policys_name_stands_for_the_policy(name: str) -> None:
    model = net()
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data_loader(),
        noise_multiplier=1.0,
        max_grad_norm=0.3,
        clipping=name,
    )
    assert engine.mechanisms[0].clipping == BY_NAME[name](0.3)


def test_two_bounds_for_one_number_are_refused() -> None:
    model = net()
    with pytest.raises(ConfigurationError, match="one number for clipping='psac'"):
        PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=data_loader(),
            noise_multiplier=1.0,
            max_grad_norm={"0": 1.0, "2": 1.0},
            clipping="psac",
        )


@pytest.mark.parametrize("name", [*BY_NAME, "group-wise"])
def test_a_target_is_kept_whatever_the_policy(name: str) -> None:
    model = net()
    given: str | ClippingPolicy = POLICIES[name](model, 0.5) if name == "group-wise" else name
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    _, _, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=data_loader(),
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=1,
        max_grad_norm=given.sensitivity if isinstance(given, ClippingPolicy) else 0.5,
        clipping=given,
    )
    for (x,) in loader:
        optimizer.zero_grad()
        loss(model, (x,)).mean().backward() if len(x) else loss(model, (x,)).sum().backward()
        optimizer.step()
    assert 3.9 < engine.get_epsilon(1e-5) <= 4.0, "the noise is relative to the sensitivity: the policy costs nothing"


@pytest.mark.parametrize("policy", [PerLayer(1.0), POLICIES["group-wise"](net(), 1.0)], ids=["per layer", "group-wise"])
def test_several_weights_for_an_example_are_refused_by_two_passes_at_construction(policy: ClippingPolicy) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="2 groups"):
        PrivateStep(
            model,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(1.0)),
            loss_per_example=loss,
            expected_batch_size=1,
            performance=Performance(passes=2),
        )
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_groups_that_are_not_the_models_are_refused_by_name() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    policy = GroupWise({"all": 1.0}, {"all": [*names[1:], "3.weight"]})
    with pytest.raises(ConfigurationError, match=r"lacks the parameters \['0.weight'\] and names \['3.weight'\]"):
        paper_sum(model, batch_of(), loss=loss, policy=policy)


# -- a policy that turns bad in mid-run --------------------------------------------------------------------------------


class Turning(ClippingPolicy):
    """Clips flatly, until `bad` is set."""

    def __init__(self) -> None:
        self.bad: Callable[[Tensor], Any] | None = None
        self.bound = 0.5

    @property
    def sensitivity(self) -> float:
        return self.bound

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        return [0] * len(names)

    def weights(self, squared_norms: Tensor) -> Tensor:
        weights = Flat(0.5).weights(squared_norms)
        return weights if self.bad is None else self.bad(weights)


BAD: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "negative": (lambda w: w.index_fill(1, torch.tensor([1]), -0.1), "negative, zero, nan or infinite"),
    "zero": (lambda w: w.index_fill(1, torch.tensor([1]), 0.0), "negative, zero, nan or infinite"),
    "nan": (lambda w: w.index_fill(1, torch.tensor([1]), math.nan), "negative, zero, nan or infinite"),
    "infinite": (lambda w: w.index_fill(1, torch.tensor([1]), math.inf), "negative, zero, nan or infinite"),
    "too large": (lambda w: w * 1.001 + 1.0, "further than its sensitivity of 0.5"),
    "no group axis": (lambda w: w[0], r"float64 \(5,\)"),
    "too few examples": (lambda w: w[:, 1:], r"float64 \(1, 4\)"),
    "too many groups": (lambda w: torch.cat([w, w]), r"float64 \(2, 5\)"),
    "whole numbers": (lambda w: w.long(), r"int64 \(1, 5\)"),
    "no tensor": (lambda w: w.tolist(), "list"),
}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, ledger: Any) -> Any:
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], ledger.state_dict()))


def assert_unchanged(before: Any, after: Any) -> None:
    assert before[2] == after[2], "the ledger"
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items())
    for key, slots in after[1].items():
        assert all(torch.equal(before[1][key][slot], value) for slot, value in slots.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", BAD)
def test_weights_that_turn_bad_in_mid_run_stop_the_papers_door_before_the_step(what: str, mode: str) -> None:
    bad, words = BAD[what]
    model, policy, engine = net(), Turning(), PrivacyEngine(accountant="rdp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data_loader(),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        clipping=policy,
        grad_sample_mode=mode,
    )

    def train() -> None:
        loss(model, batch_of()).mean().backward()
        optimizer.step()

    train()
    optimizer.zero_grad()
    before = state_of(model, optimizer, engine.ledger)
    policy.bad = bad
    with pytest.raises(ConfigurationError, match=words):
        train()
    assert_unchanged(before, state_of(model, optimizer, engine.ledger))
    if mode == "auto":
        assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
        with pytest.raises(Exception, match="without a private gradient"):
            optimizer.step()
    policy.bad = None
    optimizer.step() if mode != "auto" else train()
    assert engine.ledger.steps == 2


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("what", BAD)
def test_weights_that_turn_bad_in_mid_run_stop_the_explicit_door_before_the_step(what: str, passes: Any) -> None:
    bad, words = BAD[what]
    model, policy = net(), Turning()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(1.0)),
        loss_per_example=loss,
        expected_batch_size=1,
        performance=Performance(passes=passes),
    )
    step(batch_of())
    before = state_of(model, optimizer, step.ledger)
    policy.bad = bad
    with pytest.raises(ConfigurationError, match=words):
        step(batch_of())
    assert_unchanged(before, state_of(model, optimizer, step.ledger))
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    policy.bad = None
    step(batch_of())
    assert step.ledger.steps == 2


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("examples", [0, 5])
def test_a_sensitivity_that_turns_bad_in_mid_run_stops_the_run_before_the_step(examples: int, bound: float) -> None:
    model, policy = net(), Turning()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(1.0)),
        loss_per_example=loss,
        expected_batch_size=1,
    )
    step(batch_of())
    before = state_of(model, optimizer, step.ledger)
    policy.bound = bound
    with pytest.raises(ConfigurationError, match="sensitivity of Turning must be a finite number above 0"):
        step(batch_of(examples))
    assert_unchanged(before, state_of(model, optimizer, step.ledger))
    policy.bound = 0.5
    step(batch_of())


def test_a_sensitivity_that_is_none_is_refused_at_construction() -> None:
    policy = Turning()
    policy.bound = 0.0
    with pytest.raises(ConfigurationError, match="sensitivity of Turning"):
        Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(1.0))


@pytest.mark.parametrize("groups", [[0], [0, 0, 0, 2], [-1, 0, 0, 0], [0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1]])
def test_groups_that_are_none_are_refused_at_construction(groups: list[Any]) -> None:
    class Grouped(Turning):
        def groups(self, names: Sequence[str]) -> Sequence[int]:
            return groups

    with pytest.raises(ConfigurationError, match="numbered from 0 without a gap"):
        paper_sum(net(), batch_of(), loss=loss, policy=Grouped())


def test_a_subclass_of_a_proven_policy_is_checked_like_any_other() -> None:
    class Lax(Flat):
        def weights(self, squared_norms: Tensor) -> Tensor:
            return torch.ones_like(squared_norms)

    with pytest.raises(ConfigurationError, match="further than its sensitivity"):
        paper_sum(copied(net()), (batch_of()[0] * 1e3,), loss=loss, policy=Lax(0.5))


def test_an_example_that_is_not_finite_asks_nothing_of_the_policy() -> None:
    policy = Turning()
    poisoned = batch_of()[0].index_fill(0, torch.tensor([1]), math.nan)
    policy.bad = lambda w: w.index_fill(1, torch.tensor([1]), math.nan)
    found = explicit_sum(net(), (poisoned,), loss=loss, policy=policy)
    kept = (poisoned[[0, 2, 3, 4]],)
    assert_exact(found, reference(net(), kept, loss, Flat(0.5)))
