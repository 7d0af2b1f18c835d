"""The explicit door: what it refuses, what it leaves as it was, and how it goes on after an error."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from privet import (
    AccountingError,
    BudgetExceededError,
    ConfigurationError,
    CoverageError,
    Flat,
    Gaussian,
    Mechanism,
    PerLayer,
    Poisson,
    PrivateStep,
    ProtocolError,
    UnsupportedModelError,
)
from privet.accounting.budget import Budget
from privet.sampling import Partition
from tests.contracts.doors import assert_exact, distance, reference, size, taken

FOREIGN = "ignore:a step was taken on a batch"
MECHANISM = Mechanism(sampling=Poisson(0.25), clipping=Flat(0.5), noise=Gaussian(0.0), steps=4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def losses(m: nn.Module, b: Any) -> Tensor:
    return m(b[0]).square().sum(1)


def step_of(net: nn.Module, **options: Any) -> tuple[PrivateStep, list[dict[str, Tensor]]]:
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(net.parameters(), lr=0.1)
    settings = {"mechanism": MECHANISM, "loss_per_example": losses, "expected_batch_size": 1.0, **options}
    step = PrivateStep(net, optimizer=optimizer, **settings)
    return step, taken(net, optimizer)


def hooks_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    found = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    found += [len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()]
    return [*found, len(optimizer._optimizer_step_pre_hooks)]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no mechanism": ({"mechanism": 1.0}, ConfigurationError, "Mechanism"),
    "zero batch size": ({"expected_batch_size": 0}, ConfigurationError, "expected_batch_size"),
    "negative batch size": ({"expected_batch_size": -1.0}, ConfigurationError, "expected_batch_size"),
    "infinite batch size": ({"expected_batch_size": float("inf")}, ConfigurationError, "expected_batch_size"),
    "no loss": ({"loss_per_example": None}, (ConfigurationError, TypeError), "loss_per_example"),
    "misspelt": ({"expected_batchsize": 1.0}, TypeError, "expected_batchsize"),
    "unknown layers": (
        {"mechanism": Mechanism(sampling=Poisson(0.1), clipping=PerLayer({"third": 1.0}), noise=Gaussian(1.0))},
        ConfigurationError,
        "third",
    ),
    "secure and reproducible": (
        {"secure_mode": True, "noise_generator": torch.Generator()},
        ConfigurationError,
        "secure_mode",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_named_and_changes_nothing(case: str) -> None:
    options, kind, words = BAD[case]
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = hooks_of(net, optimizer)
    with pytest.raises(kind, match=words):
        step_of(net, optimizer=optimizer, **options)
    assert hooks_of(net, optimizer) == before
    step_of(net, optimizer=optimizer)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "0.1"])
def test_a_rate_outside_zero_and_one_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"rate must be a number in \[0, 1\]"):
        Poisson(rate)


@pytest.mark.parametrize("noise", [-1.0, float("nan"), float("inf"), "1"])
def test_noise_below_zero_is_refused(noise: Any) -> None:
    with pytest.raises(ConfigurationError, match="noise multiplier"):
        Gaussian(noise)


def test_a_description_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="clipping of a Mechanism"):
        Mechanism(sampling=Poisson(0.1), clipping=1.0, noise=Gaussian(1.0))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="steps"):
        Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=Gaussian(1.0), steps=-1)


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(AccountingError, match="No noise reaches"):
        MECHANISM.calibrated(epsilon=1.0, delta=0.0, accountant="rdp")
    fitted = MECHANISM.calibrated(epsilon=2.0, delta=1e-5, accountant="rdp")
    assert 1.99 < fitted.epsilon(1e-5, accountant="rdp") <= 2.0


LOSSES: dict[str, tuple[Any, str]] = {
    "a scalar": (lambda m, b: losses(m, b).mean(), r"shape \(\)"),
    "of shape (B, 1)": (lambda m, b: losses(m, b).unsqueeze(1), r"shape \(4, 1\)"),
    "of another size": (lambda m, b: losses(m, b)[:2], r"shape \(2,\)"),
    "detached": (lambda m, b: losses(m, b).detach(), "need no gradient"),
    "a float": (lambda m, b: 1.0, "float"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_that_is_not_one_number_for_each_example_is_refused(case: str) -> None:
    loss, words = LOSSES[case]
    net = Net()
    step, seen = step_of(net, loss_per_example=loss)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=words):
            step((torch.randn(4, 3),))
    assert step.ledger.steps == 0
    assert not seen
    assert all(type(p) is nn.Parameter and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_a_loss_over_the_batch_is_refused() -> None:
    step, _ = step_of(Net(), loss_per_example=lambda m, b: losses(m, b) * losses(m, b).mean())
    with pytest.raises((UnsupportedModelError, CoverageError)):
        step((torch.randn(4, 3),))


@pytest.mark.filterwarnings(FOREIGN)
def test_a_penalty_in_each_examples_loss_is_clipped_with_it() -> None:
    def loss(m: nn.Module, b: Any) -> Tensor:
        return losses(m, b) + m.first.weight.square().sum()

    net = Net().double()
    step, seen = step_of(net, loss_per_example=loss, optimizer=torch.optim.SGD(net.parameters(), lr=0.0))
    batch = (torch.randn(4, 3, dtype=torch.float64),)
    step(batch)
    assert_exact(seen[-1], reference(net, batch, loss, Flat(0.5)))


@pytest.mark.filterwarnings(FOREIGN)
def test_a_parameter_replaced_later_is_refused() -> None:
    net = Net()
    step, _ = step_of(net)
    step((torch.randn(4, 3),))
    before = net.first.weight.clone()
    net.second = nn.Linear(4, 2)
    with pytest.raises(ConfigurationError, match="trainable now"):
        step((torch.randn(4, 3),))
    assert torch.equal(net.first.weight, before)
    assert step.ledger.steps == 1


@pytest.mark.filterwarnings(FOREIGN)
def test_a_parameter_frozen_and_thawed_again_is_looked_at_anew() -> None:
    net = Net()
    step, seen = step_of(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0))
    for frozen in (True, False):
        net.first.requires_grad_(not frozen)
        batch = (torch.randn(4, 3),)
        step(batch)
        assert set(seen[-1]) == {n for n, p in net.named_parameters() if p.requires_grad}
        assert distance(seen[-1], reference(net, batch, losses, Flat(0.5))) < 1e-5


def test_a_step_of_the_optimizer_alone_is_refused() -> None:
    net = Net()
    step, _ = step_of(net)
    with pytest.raises(ProtocolError, match="without a private gradient"):
        step.optimizer.step()
    assert step.ledger.steps == 0


@pytest.mark.filterwarnings(FOREIGN)
def test_a_gradient_from_outside_the_step_trips_and_the_step_goes_on() -> None:
    net = Net()
    step, _ = step_of(net)
    step((torch.randn(4, 3),))
    with pytest.raises(CoverageError, match="not captured"):
        net(torch.randn(4, 3)).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    step((torch.randn(4, 3),))
    assert step.ledger.steps == 2


@pytest.mark.filterwarnings(FOREIGN)
def test_an_error_in_the_model_or_the_optimizer_leaves_a_step_that_works() -> None:
    net, fail = Net(), {"model": False, "optimizer": False}

    def loss(m: nn.Module, b: Any) -> Tensor:
        output = losses(m, b)
        if fail["model"]:
            raise ValueError("out of memory")
        return output

    class Fragile(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if fail["optimizer"]:
                raise ValueError("out of disk")
            return super().step(closure)

    step, seen = step_of(net, loss_per_example=loss, optimizer=Fragile(net.parameters(), lr=0.0))
    batch = (torch.randn(4, 3),)
    step(batch)
    for what, other in (("model", 5), ("optimizer", 6)):
        fail[what] = True
        with pytest.raises(ValueError, match="out of"):
            step((torch.randn(other, 3),))
        fail[what] = False
        assert all(type(p) is nn.Parameter for p in net.parameters())
        step(batch)
        assert distance(seen[-1], reference(net, batch, losses, Flat(0.5))) < 1e-5


@pytest.mark.filterwarnings(FOREIGN)
def test_a_step_beyond_the_budget_changes_nothing_and_the_next_may_be_cheaper() -> None:
    net = Net()
    cheap = Mechanism(sampling=Poisson(0.25), clipping=Flat(0.5), noise=Gaussian(1.0))
    step, _ = step_of(net, mechanism=cheap, budget=Budget(0.1, 1e-5))
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        with pytest.raises(BudgetExceededError):
            step((torch.randn(4, 3),))
    assert step.ledger.steps == 0
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    step.ledger.budget = None
    step((torch.randn(4, 3),))
    assert step.ledger.steps == 1


class Named(NamedTuple):
    x: Tensor
    text: list[str]


@pytest.mark.filterwarnings(FOREIGN)
@pytest.mark.parametrize("kind", ["tensor", "dict", "namedtuple", "nested"])
def test_batches_of_every_structure_may_be_empty(kind: str) -> None:
    def made(n: int) -> Any:
        x = torch.randn(n, 3)
        return {
            "tensor": x,
            "dict": {"ids": ["a"] * n, "x": x},
            "namedtuple": Named(x, ["a"] * n),
            "nested": [(x, {"y": x})],
        }[kind]

    def loss(m: nn.Module, b: Any) -> Tensor:
        x = {"tensor": lambda: b, "dict": lambda: b["x"], "namedtuple": lambda: b.x, "nested": lambda: b[0][1]["y"]}[
            kind
        ]()
        return m(x).square().sum(1)

    step, seen = step_of(Net(), loss_per_example=loss)
    for n in (0, 3, 0, 1):
        assert step(made(n)).shape == (n,)
        assert (size(seen[-1]) > 0) == (n > 0)
    assert step.ledger.steps == 4


def test_a_batch_without_a_tensor_is_refused() -> None:
    step, _ = step_of(Net())
    with pytest.raises(UnsupportedModelError, match=r"cannot be counted.*the batch\['name'\] is a str"):
        step({"name": "a", "n": 2})


@pytest.mark.filterwarnings(FOREIGN)
def test_the_step_works_in_eval_mode_and_under_no_grad() -> None:
    net = Net().double().eval()
    step, seen = step_of(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0))
    batch = (torch.randn(4, 3, dtype=torch.float64),)
    with torch.no_grad():
        step(batch)
    assert_exact(seen[-1], reference(net, batch, losses, Flat(0.5)))


def test_a_loader_is_made_by_the_mechanism() -> None:
    dataset = TensorDataset(torch.randn(20, 3))
    step, _ = step_of(Net(), expected_batch_size=5)
    loader = step.batches(dataset)
    assert loader.sampling == Poisson(0.25)
    assert len(loader) == 4
    partition = Mechanism(sampling=Partition(), clipping=Flat(0.5), noise=Gaussian(1.0))
    step, _ = step_of(Net(), mechanism=partition, expected_batch_size=5)
    assert [len(x) for (x,) in step.batches(dataset)] == [5, 5, 5, 5]


def test_a_second_loader_draws_other_batches():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    mechanism = Mechanism(sampling=Poisson(rate=0.5), clipping=Flat(1.0), noise=Gaussian(1.0), steps=20)
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=mechanism,
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
        expected_batch_size=8,
    )
    dataset = torch.utils.data.TensorDataset(torch.randn(16, 4))
    first, second = ([len(b[0]) for b in step.batches(dataset)] for _ in range(2))
    assert len(first) == len(second) == 20
    assert first != second
    for batch in step.batches(dataset):
        step(batch)
    assert step.ledger.steps == 20
    assert {type(phase.event).__name__ for phase in step.ledger.phases} == {"PoissonEvent"}
