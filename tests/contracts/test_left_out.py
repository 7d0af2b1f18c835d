"""Batches that a loop leaves out: billed where a later one of the pass is trained on; a pass may be left early."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import BudgetExceededError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.accounting.event import GaussianEvent, PartitionEvent, PoissonEvent
from privet.training.virtual_steps import BatchMemoryManager

LEFT_OUT = "batches of the private loader were left out"
DATA = TensorDataset(torch.randn(40, 3))


class Run:
    def __init__(self, *, data: TensorDataset = DATA, batch_size: int = 8, **options: Any) -> None:
        self.net, self.engine = nn.Linear(3, 2), PrivacyEngine(accountant="rdp")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        *_, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(data, batch_size=batch_size),
            noise_multiplier=2.0,
            max_grad_norm=1.0,
            loss_reduction="sum",
            **options,
        )

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.net(x).square().sum().backward()
        self.optimizer.step()

    def train(self, *, without: set[int]) -> None:
        """Takes a pass, without some of its batches."""
        for i, (x,) in enumerate(self.loader):
            if i not in without:
                self.step(x)

    def counts(self) -> dict[str, int]:
        return {type(phase.event).__name__: phase.count for phase in self.engine.ledger.phases}


def test_a_batch_left_out_in_mid_pass_is_billed_as_if_it_was_trained_on_and_said_once() -> None:
    run = Run()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            run.train(without={1, 2})
    assert [str(w.message).startswith(LEFT_OUT) for w in seen] == [True]
    assert run.counts() == {"PoissonEvent": 10}, "five batches a pass"
    assert "batches left out" in run.engine.ledger.marks


def test_empty_batches_left_out_are_billed_like_any_others() -> None:
    run = Run(data=TensorDataset(torch.randn(200, 3)), batch_size=1)
    trained = []

    def train() -> None:
        for place, (x,) in enumerate(run.loader):
            if len(x) == 0:
                continue
            run.step(x)
            trained.append(place)

    with pytest.warns(UserWarning, match=LEFT_OUT):
        train()
    assert len(trained) < 180, "about a third of the batches have nobody"
    assert run.engine.ledger.steps == trained[-1] + 1, "every batch up to the last that was trained on"


def test_a_pass_left_early_and_a_pass_only_looked_at_are_silent_and_free() -> None:
    run = Run()
    for (x,) in itertools.islice(run.loader, 3):
        run.step(x)
    with torch.no_grad():
        for (x,) in run.loader:
            run.net(x)
    next(iter(run.loader))
    for (x,) in run.loader:
        run.step(x)
    assert run.counts() == {"PoissonEvent": 8}
    assert "batches left out" not in run.engine.ledger.marks


def test_two_passes_at_once_are_no_batches_left_out() -> None:
    run = Run()
    for _, (x,) in zip(run.loader, run.loader, strict=True):
        run.step(x)
    assert run.counts() == {"PoissonEvent": 5}


def test_a_partition_is_billed_by_the_pass_whatever_is_left_out() -> None:
    run = Run(poisson_sampling=False)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        run.train(without={2})
    assert run.engine.ledger.phases[0].event == PartitionEvent(1, GaussianEvent(2.0))
    assert run.engine.ledger.steps == 1


def test_physical_batches_of_a_logical_one_are_no_batches_left_out() -> None:
    run = Run()
    with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer) as parts:
        for (x,) in parts:
            run.step(x)
    assert run.counts() == {"PoissonEvent": 5}

    def train_without_the_second() -> None:
        logical = 0
        manager = BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer)
        with manager as parts:
            for (x,) in parts:
                if logical != 1:
                    run.step(x)
                logical += parts.last

    with pytest.warns(UserWarning, match=LEFT_OUT):
        train_without_the_second()
    assert run.counts() == {"PoissonEvent": 10}


def test_the_budget_counts_batches_left_out() -> None:
    run = Run()
    three = Mechanism(sampling=Poisson(0.2), clipping=Flat(1.0), noise=Gaussian(2.0), steps=3)
    run.engine.set_budget(epsilon=three.epsilon(1e-5, accountant="rdp"), delta=1e-5)
    with pytest.warns(UserWarning, match=LEFT_OUT), pytest.raises(BudgetExceededError):
        run.train(without={1, 2})
    assert run.counts() == {"PoissonEvent": 3}
    assert run.engine.get_epsilon(1e-5) <= run.engine.ledger.budget.epsilon


def test_the_explicit_door_bills_batches_left_out() -> None:
    mechanism = Mechanism(sampling=Poisson(0.2), clipping=Flat(1.0), noise=Gaussian(2.0), steps=5)
    net = nn.Linear(3, 2)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=mechanism,
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
        expected_batch_size=8,
    )

    def train() -> None:
        for i, batch in enumerate(step.batches(DATA)):
            if i % 2 == 0:
                step(batch)

    with pytest.warns(UserWarning, match=LEFT_OUT):
        train()
    assert step.ledger.steps == 5
    assert {type(phase.event) for phase in step.ledger.phases} == {PoissonEvent}
