"""Bad input, sentence by sentence: one clear error, and model, optimizer and ledger as they were. Also in mid-run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from privet import (
    AccountingError,
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

Act = Callable[[Any], Any]
MECHANISM = Mechanism(sampling=Poisson(0.25), clipping=Flat(0.5), noise=Gaussian(1.0), steps=4)


class Net(nn.Module):
    """Returns what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.second = nn.Linear(3, 4), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)
        self.returns = "rows"

    def forward(self, x: Tensor) -> Any:
        output = self.second(torch.tanh(self.frozen(self.first(x))))
        match self.returns:
            case "columns":
                return output.t()
            case "its own loss":
                return output.square().mean()
            case _:
                return output


def losses(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().sum(1)


class Paper:
    """A run at the paper's door, after its first step."""

    def __init__(self) -> None:
        self.net = Net()
        self.optimizer = torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        self.engine = PrivacyEngine(accountant="rdp")
        self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=0.5,
        )
        self.ledger = self.engine.ledger
        self.train()
        self.optimizer.zero_grad()

    def backward(self) -> Tensor:
        loss = losses(self.net, (torch.randn(4, 3),)).mean()
        loss.backward(retain_graph=True)
        return loss

    def train(self) -> None:
        self.backward()
        self.optimizer.step()


class Explicit:
    """A run at the explicit door, after its first step."""

    def __init__(self) -> None:
        self.net = Net()
        self.optimizer = torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        self.loss: Callable[[nn.Module, Any], Any] = losses
        self.step = PrivateStep(
            self.net,
            optimizer=self.optimizer,
            mechanism=MECHANISM,
            loss_per_example=lambda m, b: self.loss(m, b),  # noqa: PLW0108 - it changes
            expected_batch_size=4,
        )
        self.ledger = self.step.ledger
        self.train()

    def train(self) -> None:
        self.step((torch.randn(4, 3),))


def state_of(run: Any) -> list[Any]:
    slots = [slot for slots in run.optimizer.state.values() for slot in slots.values()]
    return copy.deepcopy([[*run.net.state_dict().values(), *slots], run.ledger.state_dict()])


def with_output(kind: str) -> Act:
    def act(run: Any) -> None:
        run.net.returns = kind
        run.train()

    return act


def with_loss(loss: Callable[[nn.Module, Any], Any]) -> Act:
    def act(run: Any) -> None:
        run.loss = loss
        run.train()

    return act


def thawed(run: Any) -> None:
    run.net.frozen.weight.requires_grad_(True)
    run.train()


def twice_through_one_graph(run: Any) -> None:
    run.backward().backward()


def two_before_the_step(run: Any) -> None:
    run.backward()
    run.backward()


def step_twice(run: Any) -> None:
    run.optimizer.step()


def zero_grad_in_between(run: Any) -> None:
    run.backward()
    run.optimizer.zero_grad()


# what is done wrong: (at which door, what is done, the error, words for what was found and what is to be done)
IN_MID_RUN: dict[str, tuple[Any, Act, type[Exception], str, str]] = {
    "a scalar loss": (Explicit, with_loss(lambda m, b: losses(m, b).mean()), ConfigurationError, r"shape \(\)", "mean"),
    "a loss whose first axis is not the batch": (
        Explicit, with_loss(lambda m, b: m(b[0]).square().sum(0)), ConfigurationError, r"shape \(2,\)", "reduction=",
    ),
    "an output whose first axis is not the batch": (
        Paper, with_output("columns"), UnsupportedModelError, r"shape \(2, 4\) for 4", "one row for each",
    ),
    "a loss that the model computed itself": (
        Paper, with_output("its own loss"), UnsupportedModelError, "a scalar that needs a gradient", "PrivateStep",
    ),
    "a second backward through one forward": (
        Paper, twice_through_one_graph, ProtocolError, "backward ran again", "add the losses",
    ),
    "a second backward before the step": (
        Paper, two_before_the_step, ProtocolError, "second backward", "accumulate=k",
    ),
    "a step without a backward, or twice on one gradient": (
        Paper, step_twice, ProtocolError, "no backward since the last step", "one optimizer.step",
    ),
    "a step of the explicit door's optimizer": (
        Explicit, step_twice, ProtocolError, "no backward since the last step", "one optimizer.step",
    ),
    "zero_grad between backward and step": (
        Paper, zero_grad_in_between, ProtocolError, "between backward and step", "before backward, or after step",
    ),
    "a parameter thawed after make_private": (
        Paper, thawed, ConfigurationError, r"frozen\.weight is trainable now", "Freeze it again",
    ),
    "a parameter thawed after the step was made": (
        Explicit, thawed, ConfigurationError, r"frozen\.weight is trainable now", "Freeze it again",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:a step was taken on a batch:UserWarning")
@pytest.mark.parametrize("what", IN_MID_RUN)
def test_what_is_done_wrong_in_mid_run_changes_nothing(what: str) -> None:
    door, act, kind, found, advice = IN_MID_RUN[what]
    run = door()
    before = state_of(run)
    with pytest.raises(kind, match=found) as caught:
        act(run)
    assert "Expected" in str(caught.value)
    assert advice in str(caught.value)
    after = state_of(run)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert run.ledger.steps == 1
    assert all(p.grad is None for p in run.net.parameters())


# -- before the run ----------------------------------------------------------------------------------------------------


class Lengthless(Dataset[Any]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(3)


def sgd(*parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for group in parameters for p in group], lr=0.1)


def paper(net: nn.Module, optimizer: Any, **options: Any) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)
    given = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "data_loader": data, **options}
    PrivacyEngine(accountant="rdp").make_private(module=net, optimizer=optimizer, **given)


def explicit(net: nn.Module, optimizer: Any, **options: Any) -> None:
    given = {"mechanism": MECHANISM, "loss_per_example": losses, "expected_batch_size": 4, **options}
    PrivateStep(net, optimizer=optimizer, **given)


def described(**changes: Any) -> None:
    given = {"rate": 0.1, "clip_norm": 1.0, "noise": 1.0, **changes}
    sampling, clipping, noise = Poisson(given["rate"]), Flat(given["clip_norm"]), Gaussian(given["noise"])
    Mechanism(sampling=sampling, clipping=clipping, noise=noise)


PARTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "parameters that are not the model's": (lambda net: sgd(net.parameters(), nn.Linear(2, 2).parameters()), "2 param"),
    "trainable ones left out": (lambda net: sgd(net[0].parameters()), r"2\.weight, 2\.bias"),
    "nothing trainable": (lambda net: sgd(net.requires_grad_(False).parameters()), "no trainable parameter"),
}


@pytest.mark.parametrize("door", [paper, explicit])
@pytest.mark.parametrize("what", PARTS)
def test_parts_that_do_not_fit_are_refused_at_both_doors(what: str, door: Callable[..., None]) -> None:
    make, found = PARTS[what]
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = make(net)
    before = [len(net._forward_pre_hooks), len(optimizer._optimizer_step_pre_hooks), "zero_grad" in vars(optimizer)]
    with pytest.raises((ConfigurationError, UnsupportedModelError), match=found) as caught:
        door(net, optimizer)
    assert "Expected" in str(caught.value) or "Instead" in str(caught.value)
    after = [len(net._forward_pre_hooks), len(optimizer._optimizer_step_pre_hooks), "zero_grad" in vars(optimizer)]
    assert before == after
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


NUMBERS: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "noise below zero": (lambda: described(noise=-1.0), ConfigurationError, "noise multiplier .* at least 0, got -1"),
    "C of zero": (lambda: described(clip_norm=0.0), ConfigurationError, "clip_norm .* above 0, got 0"),
    "C below zero": (lambda: described(clip_norm=-1.0), ConfigurationError, "clip_norm .* above 0, got -1"),
    "a rate above one": (lambda: described(rate=1.5), ConfigurationError, r"rate .* in \[0, 1\], got 1.5"),
    "a rate below zero": (lambda: described(rate=-0.5), ConfigurationError, r"rate .* in \[0, 1\], got -0.5"),
    "a target that no noise reaches": (
        lambda: MECHANISM.calibrated(epsilon=1.0, delta=0.0) and None, AccountingError, "No noise reaches",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_out_of_range_are_refused_with_value_and_range(what: str) -> None:
    make, kind, found = NUMBERS[what]
    with pytest.raises(kind, match=found):
        make()


OPTIONS: dict[str, tuple[Callable[..., None], dict[str, Any], type[Exception], str]] = {
    "misspelt at the paper's door": (paper, {"max_grad_nrom": 1.0}, TypeError, "max_grad_nrom"),
    "misspelt at the explicit door": (explicit, {"expected_batchsize": 1.0}, TypeError, "expected_batchsize"),
    "noise below zero": (paper, {"noise_multiplier": -0.1}, ConfigurationError, "noise_multiplier .*got -0.1"),
    "C of zero": (paper, {"max_grad_norm": 0.0}, ConfigurationError, "clip_norm .*got 0"),
    "a loader without a length": (
        paper, {"data_loader": DataLoader(Lengthless(), sampler=range(4), batch_size=2)}, ConfigurationError, "sampler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
def test_options_out_of_range_are_refused_and_leave_the_parts_usable(what: str) -> None:
    door, options, kind, found = OPTIONS[what]
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = sgd(net.parameters())
    with pytest.raises(kind, match=found):
        door(net, optimizer, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        door(net, optimizer)


def test_a_dataset_without_a_length_is_refused_at_the_explicit_door() -> None:
    run = Explicit.__new__(Explicit)
    with pytest.warns(UserWarning, match="did not come"):
        run.__init__()
    before = state_of(run)
    with pytest.raises(ConfigurationError, match=r"Lengthless has no length.*__len__"):
        run.step.batches(Lengthless())
    assert before[1] == run.ledger.state_dict()
