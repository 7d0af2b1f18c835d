"""A run resumed by any framework's checkpoint knows what was spent: the ledger rides in the optimizer's state."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, LedgerError, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.accounting import FileLedger, Ledger, Relation

DATA = TensorDataset(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
STEPS = 8


class Run:
    """Eight steps of a private run, by either door."""

    def __init__(self, door: str, ledger: Any = None, kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
        self.net = nn.Linear(2, 1)
        self.optimizer = kind(self.net.parameters(), lr=0.1)
        self.door: Any
        if door == "paper":
            self.door = PrivacyEngine(ledger=ledger)
            *_, self.loader = self.door.make_private(
                module=self.net,
                optimizer=self.optimizer,
                data_loader=DataLoader(DATA, batch_size=8),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
            self.step: Callable[[Any], Any] = self._step
        else:
            self.door = self.step = PrivateStep(
                self.net,
                optimizer=self.optimizer,
                mechanism=Mechanism(sampling=Poisson(0.125), clipping=Flat(1.0), noise=Gaussian(1.0), steps=STEPS),
                loss_per_example=lambda m, b: m(b[0]).square().sum(1),
                ledger=ledger,
            )
            self.loader = self.door.batches(DATA)

    def _step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        self.net(batch[0]).square().sum(1).mean().backward()
        self.optimizer.step()

    def train(self, steps: int = STEPS) -> Run:
        for batch in itertools.islice(self.loader, steps):
            self.step(batch)
        return self

    def saved(self) -> dict[str, Any]:
        """Returns what a framework saves, through a file."""
        file = io.BytesIO()
        torch.save({"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, saved: dict[str, Any]) -> Run:
        self.net.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return self


@pytest.fixture(params=["paper", "explicit"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_resumed_run_costs_what_the_unbroken_run_costs(door: str) -> None:
    unbroken = Run(door).train().train()
    resumed = Run(door).load(Run(door).train().saved()).train()
    assert resumed.door.ledger.steps == unbroken.door.ledger.steps == 2 * STEPS
    assert resumed.door.epsilon(1e-5) == pytest.approx(unbroken.door.epsilon(1e-5), rel=1e-6)
    assert resumed.door.epsilon(1e-5) > Run(door).train().door.epsilon(1e-5) * 1.1


def test_the_optimizer_itself_is_loaded_as_ever(door: str) -> None:
    first = Run(door).train()
    saved = first.saved()
    assert set(saved["optimizer"]) == {"state", "param_groups", "privet"}
    second = Run(door).load(saved)
    for one, two in zip(first.optimizer.state.values(), second.optimizer.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], two["exp_avg"])
    ordinary = torch.optim.Adam(nn.Linear(2, 1).parameters(), lr=0.5)
    ordinary.load_state_dict(saved["optimizer"])
    assert ordinary.param_groups[0]["lr"] == 0.1
    assert set(ordinary.state_dict()) == {"state", "param_groups"}


def test_nothing_is_counted_twice_and_nothing_is_given_up(door: str, tmp_path: Path) -> None:
    first = Run(door).train()
    saved = first.saved()
    first.train(4)
    parts = {} if door == "explicit" else {"module": first.net, "optimizer": first.optimizer}
    first.door.save_checkpoint(tmp_path / "c.pt", **parts)
    first.load(saved)
    assert first.door.ledger.steps == STEPS + 4, "an earlier state of this run takes nothing back"
    second = Run(door)
    parts = {} if door == "explicit" else {"module": second.net, "optimizer": second.optimizer}
    for _ in range(2):
        second.load(saved)
        second.door.load_checkpoint(tmp_path / "c.pt", **parts)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.door.load_state_dict(first.door.state_dict())
    assert second.door.ledger.steps == STEPS + 4


def test_two_runs_that_go_on_from_one_state_both_count(door: str) -> None:
    saved = Run(door).train().saved()
    one, two = (Run(door).load(saved).train() for _ in range(2))
    one.optimizer.load_state_dict(two.optimizer.state_dict())
    assert one.door.ledger.steps == 3 * STEPS


def test_a_ledger_in_a_file_follows_the_same_rule(door: str, tmp_path: Path) -> None:
    def ledger(name: str) -> FileLedger:
        return FileLedger(tmp_path / name, relation=Relation.ZERO_OUT)

    first = Run(door, ledger("a")).train()
    other = Run(door, ledger("b")).load(first.saved()).train(2)
    assert other.door.ledger.steps == STEPS + 2
    first.load(first.saved())
    assert first.door.ledger.steps == STEPS, "the file knows its own steps"


def test_a_state_that_does_not_fit_changes_nothing(door: str) -> None:
    saved = Run(door, Ledger(relation=Relation.REPLACE_ONE)).train().saved()
    run = Run(door)
    before = copy.deepcopy(run.optimizer.state_dict())
    for wrong in (saved["optimizer"], {**before, "privet": 7}, {**before, "privet": {"format": 1, "ledger": {}}}):
        with pytest.raises((LedgerError, ValueError)):
            run.optimizer.load_state_dict(wrong)
    assert not run.optimizer.state
    assert run.door.ledger.steps == 0


def test_a_reproducible_run_that_is_resumed_so_numbers_its_steps_on() -> None:
    first = Run("paper").train()
    second = Run("paper").load(first.saved())
    assert second.door._watched[0].update.steps == STEPS


def test_weights_that_no_step_explains_are_said_once(door: str) -> None:
    saved = Run(door).train().saved()
    run = Run(door)
    run.net.load_state_dict(saved["model"])
    with pytest.warns(UserWarning, match=r"weights were loaded .* the ledger is empty"):
        run.train(1)
    run.train(2)
    del saved["optimizer"]["privet"]
    run = Run(door)
    run.load(saved)
    with pytest.warns(UserWarning, match="a state of an optimizer that holds no ledger and weights were loaded"):
        run.train(1)


def test_weights_are_not_spoken_of_where_nothing_is_unknown(door: str) -> None:
    saved = Run(door).train().saved()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(door).load(saved).train(1)
        fresh = Run(door)
        fresh.optimizer.load_state_dict(torch.optim.Adam(nn.Linear(2, 1).parameters()).state_dict())
        fresh.load(fresh.saved()).train(1)
        best = copy.deepcopy(fresh.net.state_dict())
        fresh.train(1).net.load_state_dict(best)
        fresh.train(1)


def test_copies_are_ordinary(door: str) -> None:
    run = Run(door).train()
    net, optimizer = copy.deepcopy((run.net, run.optimizer))
    assert "privet" not in optimizer.state_dict()
    net.load_state_dict(run.net.state_dict())
    optimizer.load_state_dict(run.optimizer.state_dict())


def test_the_states_of_torchs_own_checkpoints_are_served(door: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    run = Run(door).train()
    state = get_optimizer_state_dict(run.net, run.optimizer)
    set_optimizer_state_dict(run.net, run.optimizer, state)
    assert run.door.ledger.steps == STEPS


def test_a_ledger_that_does_not_ride_is_missed(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from privet.training import riding_ledger

    monkeypatch.setattr(riding_ledger.RidingLedger, "_saved", lambda self, optimizer, state: state)
    saved = Run(door).train().saved()
    run = Run(door)
    run.load(saved)
    with pytest.warns(UserWarning, match="epsilon does not know"):
        run.train()
    assert run.door.ledger.steps == STEPS
