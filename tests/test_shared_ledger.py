"""A ledger of the user's at either door: the whole role is asked for, and a file is shared by both doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep
from privet.accounting import (
    Budget,
    FileLedger,
    GaussianEvent,
    Ledger,
    LedgerLike,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    get_epsilon,
)
from privet.accounting.role import check_ledger
from privet.errors import BudgetExceededError

DATA = TensorDataset(torch.zeros(16, 2))
RATE = 0.25
STEP = PoissonEvent(RATE, GaussianEvent(1.0))


class Paper:
    """A run at the paper's door."""

    def __init__(self, **options: Any) -> None:
        self.engine = PrivacyEngine(**options)
        self.net = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        *_, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(DATA, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    def train(self, steps: int) -> None:
        for _, (x,) in zip(range(steps), self.loader, strict=False):
            self.optimizer.zero_grad()
            self.net(x).square().mean().backward()
            self.optimizer.step()

    def epsilon(self) -> float:
        return self.engine.get_epsilon(1e-5)


class Explicit:
    """A run at the explicit door."""

    def __init__(self, **options: Any) -> None:
        net = nn.Linear(2, 1)
        self.step = PrivateStep(
            net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            mechanism=Mechanism(sampling=Poisson(RATE), clipping=Flat(1.0), noise=Gaussian(1.0), steps=100),
            loss_per_example=lambda model, batch: model(batch[0]).square().sum(-1),
            expected_batch_size=4,
            **options,
        )

    def train(self, steps: int) -> None:
        for _, batch in zip(range(steps), self.step.batches(DATA), strict=False):
            self.step(batch)

    def epsilon(self) -> float:
        return self.step.epsilon(1e-5)


DOORS = [Paper, Explicit]


def shared(path: Path, **options: Any) -> FileLedger:
    return FileLedger(path, relation=Relation.ZERO_OUT, **options)


def test_both_doors_write_to_one_file(tmp_path: Path) -> None:
    for made in (Paper, Explicit, Paper):
        made(ledger=shared(tmp_path / "ledger")).train(3)
    ledger = shared(tmp_path / "ledger")
    assert (ledger.steps, len(ledger.state_dict()["runs"])) == (9, 3)  # type: ignore[arg-type]
    run = Explicit(ledger=ledger)
    assert run.epsilon() == ledger.epsilon(1e-5) == get_epsilon(ledger.event(), 1e-5, relation=Relation.ZERO_OUT)


@pytest.mark.parametrize("made", DOORS)
def test_the_ledgers_budget_stops_a_run_for_what_others_have_begun(tmp_path: Path, made: Any) -> None:
    budget = Budget(get_epsilon(SelfComposedEvent(STEP, 7), 1e-5) * 1.001, 1e-5)
    made(ledger=shared(tmp_path / "ledger")).train(4)
    run = made(ledger=shared(tmp_path / "ledger", budget=budget))
    with pytest.raises(BudgetExceededError):
        run.train(4)
    assert shared(tmp_path / "ledger").steps == 7


def test_a_run_with_a_file_saves_dies_and_resumes_with_nothing_lost(tmp_path: Path) -> None:
    first = Paper(ledger=shared(tmp_path / "ledger"))
    first.train(4)
    first.engine.save_checkpoint(tmp_path / "c.pt", module=first.net, optimizer=first.optimizer)
    first.train(4)
    second = Paper(ledger=shared(tmp_path / "ledger"))
    second.engine.load_checkpoint(tmp_path / "c.pt", module=second.net, optimizer=second.optimizer)
    second.train(1)
    assert second.engine.ledger.steps == 9, "the four steps after the save are in the file"
    in_memory = Paper()
    in_memory.engine.load_checkpoint(tmp_path / "c.pt", module=in_memory.net, optimizer=in_memory.optimizer)
    assert in_memory.engine.ledger.steps == 4


def test_batches_left_out_are_marked_in_the_file(tmp_path: Path) -> None:
    run = Paper(ledger=shared(tmp_path / "ledger"))

    def leave_one_out() -> None:
        for index, (x,) in zip(range(3), run.loader, strict=False):
            if index != 1:
                run.optimizer.zero_grad()
                run.net(x).square().mean().backward()
                run.optimizer.step()

    with pytest.warns(UserWarning, match="left out"):
        leave_one_out()
    ledger = shared(tmp_path / "ledger")
    assert (ledger.steps, ledger.marks) == (3, ("batches left out",))


class Half:
    """The part of a ledger that a hasty writer thinks of."""

    relation = Relation.ZERO_OUT

    def begin(self, event: Any, count: int = 1) -> None:
        pass

    def epsilon(self, delta: float) -> float:
        return 0.0


@pytest.mark.parametrize("made", DOORS)
def test_half_a_ledger_is_refused_at_once_with_what_it_lacks(made: Any) -> None:
    missing = "accountant, budget, event, load_state_dict, mark, marks, merge, phases, state_dict, steps, unit"
    with pytest.raises(ConfigurationError, match=f"got Half, which lacks {missing}"):
        made(ledger=Half())
    with pytest.raises(ConfigurationError, match="the class Ledger"):
        made(ledger=Ledger)
    with pytest.raises(ConfigurationError, match="got str"):
        made(ledger="census.ledger")


def test_every_member_of_the_role_is_asked_for() -> None:
    members = {name for name in dir(Ledger) if not name.startswith("_")} | {"relation", "unit"}
    role = {name for name in dir(LedgerLike) if not name.startswith("_")} | set(LedgerLike.__annotations__)
    assert role <= members
    for name in role:
        part = type("Part", (), dict.fromkeys(role - {name}))()
        with pytest.raises(ConfigurationError, match=f"got Part, which lacks {name}"):
            check_ledger(part)
    whole = type("Whole", (), dict.fromkeys(role))()
    assert check_ledger(whole) is whole


def test_the_role_is_checked_without_reading_the_file(tmp_path: Path) -> None:
    ledger = shared(tmp_path / "ledger")
    ledger.path.unlink()
    assert check_ledger(ledger) is ledger


@pytest.mark.parametrize("made", DOORS)
def test_options_that_contradict_the_ledger_are_refused(made: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"under add_or_remove_one.*relation=Relation\.ZERO_OUT"):
        made(ledger=Ledger())
    twice = {"accountant": "rdp"} if made is Paper else {"budget": Budget(1.0, 1e-5)}
    with pytest.raises(ConfigurationError, match="were both given"):
        made(ledger=Ledger(relation=Relation.ZERO_OUT), **twice)
    made(ledger=Ledger(relation=Relation.REPLACE_ONE))


@pytest.mark.parametrize("made", DOORS)
def test_a_ledger_set_afterwards_is_refused_and_not_ignored(made: Any) -> None:
    run = made()
    owner = run.engine if made is Paper else run.step
    with pytest.raises(AttributeError):
        owner.ledger = Ledger()
