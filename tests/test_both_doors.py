"""Both doors take and offer the same words, and a number has one home."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    Budget,
    BudgetExceededError,
    ConfigurationError,
    Flat,
    Gaussian,
    Ledger,
    Mechanism,
    Partition,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    Relation,
    Unit,
)
from privet.accounting.event import GaussianEvent, PoissonEvent, repeated
from privet.clipping import ClippingPolicy

DATA = TensorDataset(torch.randn(64, 3), torch.randn(64))
MECHANISM = Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.3), steps=4)
SAMPLED = PoissonEvent(0.25, GaussianEvent(1.3))
torch.set_num_threads(1)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch[0]).square().sum(1)


class Paper:
    """A run through the paper's door."""

    def __init__(self, **options: Any) -> None:
        self.net = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.door = PrivacyEngine(**options)
        *_, self.loader = self.door.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(DATA, batch_size=16),
            noise_multiplier=1.3,
            max_grad_norm=1.0,
        )

    def train(self, steps: int) -> None:
        for (x, _), _ in zip(self.loader, range(steps), strict=False):
            self.optimizer.zero_grad()
            self.net(x).square().sum(1).mean().backward()
            self.optimizer.step()

    def save(self, file: Any) -> None:
        self.door.save_checkpoint(file, module=self.net, optimizer=self.optimizer, extra={"epoch": 3})

    def load(self, file: Any) -> dict[str, Any]:
        return self.door.load_checkpoint(file, module=self.net, optimizer=self.optimizer)


class Explicit:
    """A run through the explicit door."""

    def __init__(self, mechanism: Mechanism = MECHANISM, *, loss_of: Any = loss, **options: Any) -> None:
        self.net = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.door = PrivateStep(
            self.net, optimizer=self.optimizer, mechanism=mechanism, loss_per_example=loss_of, **options
        )
        self.loader = self.door.batches(DATA)

    def train(self, steps: int) -> None:
        for batch, _ in zip(self.loader, range(steps), strict=False):
            self.door(batch)

    def save(self, file: Any) -> None:
        self.door.save_checkpoint(file, extra={"epoch": 3})

    def load(self, file: Any) -> dict[str, Any]:
        return self.door.load_checkpoint(file)


both = pytest.mark.parametrize("run_of", [Paper, Explicit], ids=["paper", "explicit"])
Run = Paper | Explicit


# -- the ledger --------------------------------------------------------------------------------------------------------


@both
def test_a_ledger_that_is_given_gets_every_step(run_of: Callable[..., Run]) -> None:
    ledger = Ledger(relation=Relation.ZERO_OUT, accountant="rdp", budget=Budget(50.0, 1e-5))
    first, second = run_of(ledger=ledger), run_of(ledger=ledger)
    first.train(2)
    second.train(1)
    assert first.door.ledger is second.door.ledger is ledger
    assert [(p.event, p.count) for p in ledger.phases] == [(SAMPLED, 3)]
    assert first.door.accountant.name == "rdp"
    assert first.door.budget == Budget(50.0, 1e-5)
    assert first.door.epsilon(1e-5) == first.door.get_epsilon(1e-5) == ledger.epsilon(1e-5) > 0.0


@both
def test_a_ledger_cannot_be_replaced(run_of: Callable[..., Run]) -> None:
    run = run_of()
    with pytest.raises(AttributeError, match="Pass ledger= there"):
        run.door.ledger = Ledger(relation=Relation.ZERO_OUT)
    run.train(1)
    assert run.door.ledger.steps == 1


@both
def test_a_ledger_that_lacks_a_part_of_the_role_is_refused_when_it_is_handed_over(run_of: Callable[..., Run]) -> None:
    class Half:
        relation, unit, budget, steps, phases = Relation.ZERO_OUT, Unit.EXAMPLE, None, 0, ()

        def begin(self, event: Any, count: int = 1) -> None:
            raise AssertionError("no step may be taken")

    with pytest.raises(ConfigurationError, match=r"Half, which lacks .*mark"):
        run_of(ledger=Half())
    with pytest.raises(ConfigurationError, match="the class Ledger"):
        run_of(ledger=Ledger)


@both
@pytest.mark.parametrize(
    "setting", [{"accountant": "rdp"}, {"budget": Budget(1.0, 1e-5)}, {"relation": "zero_out"}, {"unit": "user"}]
)
def test_what_a_ledger_has_itself_is_not_said_twice(run_of: Callable[..., Run], setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"ledger and {next(iter(setting))} were both given"):
        run_of(ledger=Ledger(relation=Relation.ZERO_OUT), **setting)


@both
def test_relation_unit_accountant_and_budget_are_those_that_were_given(run_of: Callable[..., Run]) -> None:
    run = run_of(relation="replace_one", unit=Unit.USER, accountant="rdp", budget=Budget(100.0, 1e-5))
    run.train(2)
    ledger = run.door.ledger
    assert (ledger.relation, ledger.unit, ledger.budget) == (Relation.REPLACE_ONE, Unit.USER, Budget(100.0, 1e-5))
    two = Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.3), steps=2)
    expected = two.epsilon(1e-5, accountant="rdp", relation=Relation.REPLACE_ONE)
    assert run.door.epsilon(1e-5) == expected > 1.1 * two.epsilon(1e-5, accountant="rdp")
    assert run.door.epsilon(1e-5, accountant="pld") < run.door.epsilon(1e-5)


@both
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"relation": "add_or_remove_one"}, "number of examples is public"),
        ({"relation": "both"}, "relation must be one of"),
        ({"unit": "thing"}, "unit must be one of"),
    ],
)
def test_a_relation_that_does_not_hold_in_training_is_refused(
    run_of: Callable[..., Run], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        run_of(**options)


@both
def test_a_budget_stops_the_step_that_would_exceed_it(run_of: Callable[..., Run]) -> None:
    two = Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.3), steps=2)
    run = run_of(accountant="rdp", budget=Budget(two.epsilon(1e-5, accountant="rdp") * 1.0001, 1e-5))
    run.train(2)
    with pytest.raises(BudgetExceededError):
        run.train(1)
    assert run.door.ledger.steps == 2
    run.door.set_budget(epsilon=100.0, delta=1e-5)
    run.train(1)
    assert run.door.ledger.steps == 3


def test_calibration_is_for_the_relation_of_the_engine() -> None:
    multipliers = []
    for relation in (None, "replace_one"):
        engine, net = PrivacyEngine(accountant="rdp", relation=relation), nn.Linear(3, 2)
        engine.make_private_with_epsilon(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(DATA, batch_size=16),
            target_epsilon=2.0,
            target_delta=1e-5,
            epochs=1,
            max_grad_norm=1.0,
        )
        four = Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=engine.mechanisms[0].noise, steps=4)
        assert 1.99 < four.epsilon(1e-5, accountant="rdp", relation=engine.ledger.relation) <= 2.0
        multipliers.append(engine.mechanisms[0].noise.multiplier)
    assert multipliers[1] > 1.1 * multipliers[0]


# -- the state of a run ------------------------------------------------------------------------------------------------


@both
def test_a_state_in_a_file_of_ones_own_keeps_what_was_spent(run_of: Callable[..., Run]) -> None:
    first, second = run_of(accountant="rdp"), run_of(accountant="rdp")
    first.train(3)
    file = io.BytesIO()
    torch.save({"model": first.net.state_dict(), "privacy": first.door.state_dict()}, file)
    file.seek(0)
    second.door.load_state_dict(torch.load(file, weights_only=True)["privacy"])
    assert second.door.epsilon(1e-5) == first.door.epsilon(1e-5) > 0.0
    second.train(1)
    assert [(p.event, p.count) for p in second.door.ledger.phases] == [(SAMPLED, 4)]


@both
def test_a_checkpoint_goes_to_a_path_or_an_open_file(run_of: Callable[..., Run], tmp_path: Any) -> None:
    first = run_of(accountant="rdp")
    first.train(2)
    memory = io.BytesIO()
    first.save(memory)
    memory.seek(0)
    first.save(tmp_path / "run.pt")
    for file in (memory, tmp_path / "run.pt", str(tmp_path / "run.pt")):
        second = run_of(accountant="rdp")
        assert second.load(file) == {"epoch": 3}
        assert torch.equal(second.net.weight, first.net.weight)
        assert second.door.ledger.steps == 2


@both
def test_a_state_of_other_settings_changes_nothing(run_of: Callable[..., Run]) -> None:
    first = run_of(accountant="rdp")
    first.train(1)
    state = first.door.state_dict()
    state["updates"][0]["settings"]["divisor"] = 999.0
    other = run_of(accountant="rdp")
    with pytest.raises(ConfigurationError, match=r"divisor: saved 999\.0, now 16"):
        other.door.load_state_dict(state)
    with pytest.raises(ConfigurationError, match="not a checkpoint of this version"):
        other.door.load_state_dict({"ledger": state["ledger"]})
    assert other.door.ledger.steps == 0


# -- what is shown -----------------------------------------------------------------------------------------------------


@both
def test_a_door_says_what_runs(run_of: Callable[..., Run]) -> None:
    run = run_of(accountant="rdp", budget=Budget(30.0, 1e-6), unit="user")
    run.train(2)
    shown = repr(run.door)
    epsilon = f"{run.door.epsilon(1e-6):.4g} at δ = 1e-06"
    for words in (epsilon, "ε = 30 at", "rdp", "Ledger, 2 begun, zero_out, one user", "Poisson(rate=0.25)", "Linear"):
        assert words in shown
    assert "Flat(clip_norm=1.0), Gaussian(multiplier=1.3), divided by 16" in shown
    table = run.door._repr_html_()
    assert epsilon in table
    assert "<th>Linear</th>" in table


def test_a_door_shown_as_html_holds_no_markup_of_its_parts() -> None:
    class Odd(Flat):
        def __repr__(self) -> str:
            return "<script>"

    shown = Explicit(Mechanism(sampling=Poisson(0.25), clipping=Odd(1.0), noise=Gaussian(1.0)), accountant="rdp")
    assert "<script>" not in shown.door._repr_html_()
    assert "&lt;script&gt;" in shown.door._repr_html_()


# -- a number has one home ---------------------------------------------------------------------------------------------


def gradient(**options: Any) -> torch.Tensor:
    """Returns the gradient of one step with no noise, of an example that is in every batch."""
    mechanism = Mechanism(sampling=options.pop("sampling", Poisson(1.0)), clipping=Flat(1.0), noise=Gaussian(0.0))
    run = Explicit(mechanism, loss_of=lambda m, b: m(b[0]).sum(1), accountant="rdp", **options)
    with torch.no_grad():
        run.net.weight.zero_()
    seen = []
    run.optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].grad.clone()))
    run.train(1)
    return seen[0]


@pytest.mark.parametrize("sampling", [Poisson(1.0), Partition(batch_size=64)], ids=str)
def test_the_divisor_follows_from_the_sampling(sampling: Any) -> None:
    assert torch.equal(gradient(sampling=sampling), gradient(sampling=sampling, expected_batch_size=64))
    assert float(gradient(sampling=sampling).norm()) > 0.0


@pytest.mark.parametrize("wrong", [1.0, 15.0, 17.0, 999.0])
@pytest.mark.parametrize("sampling", [Poisson(0.25), Partition(batch_size=16)], ids=str)
def test_a_divisor_that_contradicts_the_sampling_is_refused(wrong: float, sampling: Any) -> None:
    mechanism = Mechanism(sampling=sampling, clipping=Flat(1.0), noise=Gaussian(1.0))
    with pytest.raises(ConfigurationError, match=r"draws 16 of 64 examples on average"):
        Explicit(mechanism, expected_batch_size=wrong)
    assert Explicit(mechanism, expected_batch_size=16.3).door._update.divisor.value == 16.3, "a rounded rate"


def test_a_second_dataset_of_another_size_is_refused() -> None:
    run = Explicit()
    with pytest.raises(ConfigurationError, match=r"expected_batch_size is 16, and .* draws 25 of 100"):
        run.door.batches(TensorDataset(torch.randn(100, 3)))


def test_a_batch_of_ones_own_needs_the_divisor_and_nothing_is_billed_without() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step = PrivateStep(net, optimizer=optimizer, mechanism=MECHANISM, loss_per_example=loss, accountant="rdp")
    before = net.weight.detach().clone()
    with pytest.raises(ConfigurationError, match="Give expected_batch_size="):
        step((torch.randn(4, 3),))
    assert step.ledger.steps == 0
    assert torch.equal(net.weight, before)
    for batch in step.batches(DATA):
        step(batch)
    assert step.ledger.steps == 4


def test_padded_batches_have_a_size_once_the_dataset_is_known() -> None:
    run = Explicit(performance=Performance(padded=True), accountant="rdp")
    assert run.door._size.most == 24, "16 and twice its root"
    run.train(1)


def test_a_policy_brings_its_own_clip_norm() -> None:
    def private(**options: Any) -> PrivacyEngine:
        engine, net = PrivacyEngine(accountant="rdp"), nn.Linear(3, 2)
        optimizer, loader = torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(DATA, batch_size=16)
        engine.make_private(module=net, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, **options)
        return engine

    assert private(clipping=Flat(0.3)).mechanisms[0].clipping == Flat(0.3)
    assert private(clipping=Flat(0.3), max_grad_norm=0.3).mechanisms[0].clipping == Flat(0.3)
    with pytest.raises(ConfigurationError, match="a clip norm has one home"):
        private(clipping=Flat(0.3), max_grad_norm=1.0)
    with pytest.raises(ConfigurationError, match="max_grad_norm is missing"):
        private()


def test_a_partition_hides_nobody_behind_a_declared_size() -> None:
    engine, net = PrivacyEngine(), nn.Linear(3, 2)
    with pytest.raises(ConfigurationError, match="moves all those after it"):
        engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(DATA, batch_size=16),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            dataset_size=65,
        )


# -- roles -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded(Gaussian):
    """Another noise, by its class."""


def test_the_noise_cannot_become_another_one_in_mid_run() -> None:
    run = Explicit(accountant="rdp")
    with pytest.raises(ConfigurationError, match="not be the one that is billed"):
        run.door._update.mechanism = Mechanism(sampling=Poisson(0.25), clipping=Flat(1.0), noise=Rounded(9.0))
    run.train(1)
    assert [(p.event, p.count) for p in run.door.ledger.phases] == [(SAMPLED, 1)]


@pytest.mark.parametrize("drawn", [[0, 0], [64], [-1]])
def test_a_sampling_that_draws_an_example_twice_or_none_at_all_is_stopped(drawn: list[int]) -> None:
    class Wrong(Poisson):
        def draw(self, *args: Any, **kwargs: Any) -> list[int]:
            return drawn

    run = Explicit(Mechanism(sampling=Wrong(0.25), clipping=Flat(1.0), noise=Gaussian(1.0), steps=2), accountant="rdp")
    with pytest.raises(ConfigurationError, match="drew an example twice, or an index outside"):
        run.train(1)
    assert run.door.ledger.steps == 0


class Half(Poisson):
    """A sampling of one's own: it draws what Poisson sampling draws, and is billed as if nothing was sampled."""

    def event_for(self, base_event: Any, count: int = 1) -> Any:
        return repeated(base_event, count)


@pytest.mark.parametrize("door", ["paper", "explicit"])
def test_a_sampling_of_ones_own_is_billed_as_it_says(door: str) -> None:
    if door == "explicit":
        run = Explicit(Mechanism(sampling=Half(0.25), clipping=Flat(1.0), noise=Gaussian(1.3), steps=4))
        run.train(4)
        ledger = run.door.ledger
    else:
        engine, net = PrivacyEngine(accountant="rdp"), nn.Linear(3, 2)
        optimizer, loader = torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(DATA, batch_size=16)
        given = {"module": net, "optimizer": optimizer, "data_loader": loader, "max_grad_norm": 1.0}
        with pytest.raises(ConfigurationError, match=r"batch_size=16, and .* draws 32 of 64"):
            engine.make_private(noise_multiplier=1.3, sampling=Half(0.5), **given)
        with pytest.raises(ConfigurationError, match="both say how batches are formed"):
            engine.make_private(noise_multiplier=1.3, sampling=Half(0.25), poisson_sampling=False, **given)
        *_, loader = engine.make_private(noise_multiplier=1.3, sampling=Half(0.25), **given)
        for x, _ in loader:
            optimizer.zero_grad()
            net(x).square().sum(1).mean().backward()
            optimizer.step()
        ledger = engine.ledger
    assert [(p.event, p.count) for p in ledger.phases] == [(GaussianEvent(1.3), 4)]


def test_a_subclass_of_a_proven_policy_is_checked_at_run_time() -> None:
    class Greedy(Flat):
        def weights(self, squared_norms: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().weights(squared_norms)

    policy: ClippingPolicy = Greedy(1e-3)
    run = Explicit(Mechanism(sampling=Poisson(1.0), clipping=policy, noise=Gaussian(1.0)), accountant="rdp")
    with warnings.catch_warnings(), pytest.raises(ConfigurationError, match="further than its sensitivity"):
        run.train(1)
    assert run.door.ledger.steps == 0
