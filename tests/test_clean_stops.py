"""A run that is stopped by its budget, or that cannot begin: one clear error, and everything is as it was."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import AccountingError, BudgetExceededError, ConfigurationError, PrivacyEngine, ProtocolError
from privet.training.virtual_steps import BatchMemoryManager

MODES = ("auto", "hooks", "functorch")


class Run:
    def __init__(self, mode: str = "auto", *, steps: int | None = 2) -> None:
        self.net, self.engine = nn.Linear(3, 2), PrivacyEngine(accountant="rdp")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        *_, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            loss_reduction="sum",
            grad_sample_mode=mode,
        )
        if steps is not None:
            mechanism = self.engine.mechanisms[0]
            epsilon = mechanism.__class__(
                sampling=mechanism.sampling, clipping=mechanism.clipping, noise=mechanism.noise, steps=steps
            ).epsilon(1e-5, accountant="rdp")
            self.engine.set_budget(epsilon=epsilon, delta=1e-5)

    def train(self, batches: Any) -> None:
        for (x,) in batches:
            self.optimizer.zero_grad()
            self.net(x).square().sum().backward()
            self.optimizer.step()

    def state(self) -> Any:
        return copy.deepcopy(
            [
                list(self.net.state_dict().values()),
                [slot for slots in self.optimizer.state_dict()["state"].values() for slot in slots.values()],
                self.engine.ledger.state_dict(),
            ]
        )


def same(a: Any, b: Any) -> bool:
    return a[2] == b[2] and all(torch.equal(x, y) for i in (0, 1) for x, y in zip(a[i], b[i], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_meets_its_budget_stops_cleanly(mode: str) -> None:
    run = Run(mode)
    batches = iter(run.loader)
    run.train(itertools.islice(batches, 2))
    run.optimizer.zero_grad()
    before = run.state()
    with pytest.raises(BudgetExceededError, match="Nothing was begun"):
        run.train([next(batches)])
    assert same(before, run.state())
    assert all(p.grad is None and type(p) is nn.Parameter for p in run.net.parameters())
    run.optimizer.zero_grad()  # nothing waits
    with pytest.raises(ProtocolError, match="no backward"):
        run.optimizer.step()
    assert same(before, run.state())
    run.engine.set_budget(epsilon=100.0, delta=1e-5)
    with pytest.warns(UserWarning, match="left out"):  # the batch that was refused had no step
        run.train([next(batches)])
    assert run.engine.ledger.steps == 4


def test_a_run_of_physical_batches_that_meets_its_budget_stops_cleanly() -> None:
    run = Run()
    after: list[Any] = []

    def train() -> None:
        manager = BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=3, optimizer=run.optimizer)
        with manager as parts:
            for batch in parts:
                run.train([batch])
                after.append(run.state())

    with pytest.raises(BudgetExceededError):
        train()
    assert run.engine.ledger.steps == 2
    assert same(after[-1], run.state())
    run.optimizer.zero_grad()
    assert not run.engine._watched[0].update.pending


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 0.0), (1e-20, 1e-300)])
def test_a_target_that_no_noise_reaches_is_one_error_and_changes_nothing(
    accountant: str, epsilon: float, delta: float
) -> None:
    net, engine = nn.Linear(3, 2), PrivacyEngine(accountant=accountant)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    arguments: dict[str, Any] = {
        "module": net,
        "optimizer": optimizer,
        "data_loader": DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8),
        "max_grad_norm": 1.0,
    }
    with pytest.raises((AccountingError, ConfigurationError), match=r"(?i)no .*noise|reach|no finite ε"):
        engine.make_private_with_epsilon(**arguments, target_epsilon=epsilon, target_delta=delta, epochs=1)
    assert engine.mechanisms == ()
    assert engine.ledger.budget is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not net._forward_pre_hooks
    engine.make_private(**arguments, noise_multiplier=1.0)
