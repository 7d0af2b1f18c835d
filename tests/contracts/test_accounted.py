"""Law 2: what is billed is what ran, by each door, whatever the loop does."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import BudgetExceededError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.accounting.budget import Budget
from privet.accounting.event import GaussianEvent, PartitionEvent, PoissonEvent
from privet.sampling import Partition
from tests.contracts.doors import loader

UNSAMPLED = GaussianEvent(1.0)
SAMPLED = PoissonEvent(0.25, UNSAMPLED)
PASS = PartitionEvent(1, UNSAMPLED)


class Run:
    """A small private run at the paper's door, and what it has billed."""

    def __init__(self, **options: Any) -> None:
        self.net = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.engine = PrivacyEngine(accountant="rdp")
        self.dataset = TensorDataset(torch.randn(16, 2), torch.randn(16))
        given = DataLoader(self.dataset, batch_size=4, shuffle=options.pop("shuffle", False))
        _, _, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=given,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **options,
        )

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.net(x).square().mean().backward()
        self.optimizer.step()

    @property
    def billed(self) -> dict[Any, int]:
        found: dict[Any, int] = {}
        for phase in self.engine.ledger.phases:
            found[phase.event] = found.get(phase.event, 0) + phase.count
        return found


def test_a_poisson_epoch_is_billed_by_the_step_at_the_exact_rate() -> None:
    run = Run()
    for x, _ in run.loader:
        run.step(x)
    assert run.billed == {SAMPLED: 4}
    assert run.engine.get_epsilon(1e-5) == Mechanism(
        sampling=Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.0), steps=4
    ).epsilon(1e-5, accountant="rdp")


def test_rates_are_never_floored() -> None:
    net = nn.Linear(2, 1)
    _, _, private = PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader(n=10, batch_size=3),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert private.sampling == Poisson(3 / 10)
    assert len(private) == 4
    assert private.expected_batch_size == 3


def test_a_declared_size_replaces_the_private_one_everywhere() -> None:
    run = Run(dataset_size=40)
    assert run.loader.sampling == Poisson(4 / 40)
    assert len(run.loader) == 10
    assert run.loader.expected_batch_size == 4


@pytest.mark.parametrize("foreign", ["another loader", "two steps on one batch"])
def test_a_batch_that_was_not_sampled_is_billed_as_such(foreign: str) -> None:
    run = Run()
    first = (next(iter(run.loader))[0] for _ in range(100))  # of a pass each, so that none is left out
    batch = next(x for x in first if len(x))
    others = {
        "two steps on one batch": [batch],
        "another loader": [x for x, _ in DataLoader(run.dataset, batch_size=4, shuffle=True)],
    }[foreign]
    run.step(batch)
    assert run.billed == {SAMPLED: 1}
    with pytest.warns(UserWarning, match="did not come, whole and fresh, from the private loader"):
        run.step(others[0])
    for x in others[1:]:
        run.step(x)
    assert run.billed == {SAMPLED: 1, UNSAMPLED: len(others)}
    assert run.engine.get_epsilon(1e-5) > 1.0


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_partition_is_billed_by_the_pass_begun_and_never_amplified(shuffle: bool) -> None:
    run = Run(poisson_sampling=False, shuffle=shuffle)
    assert run.loader.sampling == Partition(shuffled=shuffle, batch_size=4)
    assert run.engine.get_epsilon(1e-5) == 0.0
    for x, _ in itertools.islice(run.loader, 1):
        run.step(x)
    assert run.billed == {PASS: 1}, "a pass left early is a pass"
    for _ in range(2):
        for x, _ in run.loader:
            run.step(x)
    assert run.billed == {PASS: 3}
    gaussian = Mechanism(sampling=Poisson(1.0), clipping=Flat(1.0), noise=Gaussian(1.0), steps=3)
    assert run.engine.get_epsilon(1e-5) == pytest.approx(gaussian.epsilon(1e-5, accountant="rdp"), rel=0.05)


def test_interleaved_passes_of_a_partition_are_all_billed() -> None:
    run = Run(poisson_sampling=False)
    first, second = iter(run.loader), iter(run.loader)
    next(first)
    run.step(next(second)[0])
    with pytest.warns(UserWarning, match="batches of the private loader were left out"):
        run.step(next(first)[0])  # the batch before it in its own pass got no step
    assert run.billed == {PASS: 2}


def test_a_batch_left_out_is_billed_although_another_pass_ran_in_between() -> None:
    run = Run()
    first, second = iter(run.loader), iter(run.loader)
    next(first)
    run.step(next(second)[0])
    with pytest.warns(UserWarning, match="batches of the private loader were left out"):
        run.step(next(first)[0])
    assert run.billed == {SAMPLED: 3}


def test_a_shuffled_loader_never_gets_the_epsilon_of_poisson_sampling() -> None:
    epsilons = []
    for sampling, count in ((Poisson(0.01), 1000), (Partition(shuffled=True), 10)):
        mechanism = Mechanism(sampling=sampling, clipping=Flat(1.0), noise=Gaussian(1.0), steps=count)
        epsilons.append(mechanism.epsilon(1e-5, accountant="rdp"))
    assert epsilons[1] > 3.0 * epsilons[0]


def test_no_noise_is_no_privacy() -> None:
    net = nn.Linear(2, 1)
    optimizer, engine = torch.optim.SGD(net.parameters(), lr=0.1), PrivacyEngine(accountant="rdp")
    _, _, private = engine.make_private(
        module=net, optimizer=optimizer, data_loader=loader(), noise_multiplier=0.0, max_grad_norm=1.0
    )
    assert engine.get_epsilon(1e-5) == 0.0
    for x, _ in itertools.islice(private, 1):
        net(x).square().mean().backward()
        optimizer.step()
    assert engine.get_epsilon(1e-5) == math.inf


def test_a_changed_mechanism_opens_a_phase() -> None:
    from dataclasses import replace

    run = Run()
    update = run.engine._watched[0].update
    for i, (x, _) in enumerate(run.loader):
        if i == 2:
            update.mechanism = replace(update.mechanism, noise=Gaussian(2.0))
        run.step(x)
    assert run.billed == {SAMPLED: 2, PoissonEvent(0.25, GaussianEvent(2.0)): 2}


def test_two_networks_on_one_engine_both_pay() -> None:
    run, other = Run(), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    _, _, private = run.engine.make_private(
        module=other,
        optimizer=optimizer,
        data_loader=DataLoader(run.dataset, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for (x, _), (y, _) in zip(run.loader, private, strict=True):
        run.step(x)
        optimizer.zero_grad()
        other(y).square().mean().backward()
        optimizer.step()
    assert run.billed == {SAMPLED: 8}


def test_a_users_own_step_hook_does_not_disconnect_the_ledger() -> None:
    run, calls = Run(), []
    run.optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    run.optimizer.register_step_post_hook(lambda *a: calls.append("post"))
    for x, _ in itertools.islice(run.loader, 2):
        run.step(x)
    assert calls == ["pre", "post"] * 2
    assert run.billed == {SAMPLED: 2}


def test_a_step_that_breaks_after_billing_stays_billed_and_its_noise_is_not_drawn_again() -> None:
    run = Run()
    noise = run.engine._watched[0].update.noise
    for i, (x, _) in enumerate(run.loader):
        if i == 0:
            release = noise.release
            noise.release = None  # type: ignore[method-assign, assignment]
            with pytest.raises(TypeError):
                run.step(x)
            noise.release = release  # type: ignore[method-assign]
            assert run.billed == {SAMPLED: 1}
            assert run.net.weight.grad is None
        else:
            run.step(x)
    assert run.billed == {SAMPLED: 4}
    assert run.engine._watched[0].update.steps == 4


# -- the explicit door -------------------------------------------------------------------------------------------------


def explicit(budget: Budget | None = None, sampling: Any = None, steps: int = 4) -> tuple[PrivateStep, TensorDataset]:
    net = nn.Linear(2, 1)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=sampling or Poisson(0.25), clipping=Flat(1.0), noise=Gaussian(1.0), steps=steps),
        loss_per_example=lambda m, b: m(b[0]).square()[:, 0],
        expected_batch_size=4,
        budget=budget,
    )
    return step, TensorDataset(torch.randn(16, 2), torch.randn(16))


def test_the_explicit_door_takes_its_planned_steps_at_the_planned_cost() -> None:
    step, dataset = explicit()
    for batch in step.batches(dataset):
        step(batch)
    assert step.ledger.phases[0].event == SAMPLED
    assert step.ledger.steps == 4
    assert step.epsilon(1e-5, accountant="rdp") == step.mechanism.epsilon(1e-5, accountant="rdp")


def test_the_explicit_door_bills_a_foreign_batch_without_amplification() -> None:
    step, dataset = explicit()
    with pytest.warns(UserWarning, match="did not come"):
        step(dataset[:4])
    assert step.ledger.phases[0].event == UNSAMPLED


def test_the_explicit_door_bills_passes_of_a_partition() -> None:
    step, dataset = explicit(sampling=Partition(shuffled=True), steps=2)
    private = step.batches(dataset)
    assert len(private) == 4
    for _ in range(2):
        for batch in private:
            step(batch)
    assert [(p.event, p.count) for p in step.ledger.phases] == [(PASS, 2)]


def test_a_budget_stops_the_explicit_door_before_the_step() -> None:
    planned = explicit()[0].mechanism.epsilon(1e-5)
    step, dataset = explicit(budget=Budget(planned * 1.001, 1e-5))
    taken = 0
    private = step.batches(dataset)
    for batch in private:
        step(batch)
        taken += 1
    before = step.model.weight.clone()
    batch = next(iter(private))
    with pytest.raises(BudgetExceededError):
        step(batch)
    assert taken == 4
    assert torch.equal(before, step.model.weight)
    assert step.epsilon(1e-5) <= planned * 1.001
    assert not step._update.pending


def test_a_new_loader_each_epoch_is_a_new_pass_each_epoch() -> None:
    """Every loader counts its passes from 1: the number alone does not tell two passes apart."""
    step, dataset = explicit(sampling=Partition(shuffled=True, batch_size=4), steps=3)
    for _ in range(3):
        for batch in step.batches(dataset):
            step(batch)
    assert [(p.event, p.count) for p in step.ledger.phases] == [(PASS, 3)]


def test_a_pass_that_is_set_back_is_billed_again() -> None:
    """Its batches come again under the same number of the pass."""
    run = Run(poisson_sampling=False)
    for _ in range(3):
        batches = iter(run.loader)
        run.step(next(batches)[0])
        state = run.loader.state_dict()
        run.step(next(batches)[0])
        run.loader.load_state_dict(state)
    assert run.billed == {PASS: 3}
