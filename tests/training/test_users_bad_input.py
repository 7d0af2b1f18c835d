"""What users cost, what a ledger says of them, and what is refused before anything is released."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from privet import (
    BatchMemoryManager,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    Users,
)
from privet.accounting import Ledger, Relation, Unit, get_epsilon
from privet.report.hazards import BY_USER, ROWS_TOO
from privet.training.whose import ROWS_MARK, USERS_MARK
from tests.contracts.doors import assert_exact, taken
from tests.training.users import IDS, MOST, USERS, data_of, explicit, loss, model_of, reference


def test_epsilon_is_of_a_user() -> None:
    model = model_of("positions")
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0), steps=3),
        loss_per_example=loss,
        unit="user",
    )
    for batch in step.batches(data_of(), users=Users(IDS, most=MOST)):
        step(batch)
    assert step.ledger.unit is Unit.USER
    assert step.ledger.steps == 3
    assert USERS_MARK in step.ledger.marks
    assert ROWS_MARK not in step.ledger.marks
    assert step.epsilon(delta=1e-3) == get_epsilon(Poisson(0.5).event_for(step.mechanism.release, 3), 1e-3)
    assert any("one user" in note for note in step.ledger.epsilon_bounds(1e-3).notes)


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
@pytest.mark.parametrize("first", ["users", "rows"])
def test_a_ledger_with_rows_beside_users_says_so(first: str) -> None:
    engine = PrivacyEngine(unit="user")
    options = {"users": {"users": Users(IDS, most=MOST)}, "rows": {}}
    for kind in (first, "rows" if first == "users" else "users"):
        model = model_of("positions")
        _, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data_of(), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **options[kind],
        )
        for _, x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            break
    assert {ROWS_MARK, USERS_MARK} <= set(engine.ledger.marks)


@pytest.mark.parametrize(
    ("users", "found"),
    [
        (lambda: Users(IDS, most=MOST, beyond="refuse"), "more records than the contribution bound of 4"),
        (lambda: Users(IDS[:-1], most=MOST), "23 entries, and the dataset has 24"),
        (lambda: Users(IDS.double(), most=MOST), "whole numbers or strings"),
        (lambda: Users([None, *IDS[1:].tolist()], most=MOST), "whole numbers or strings"),
        (lambda: Users(["1", *IDS[1:].tolist()], most=MOST), "whole numbers or strings"),
        (lambda: Users(IDS.view(2, -1), most=MOST), "2 axes"),
        (lambda: Users(IDS, most=0), "most must be a whole number of at least 1"),
        (lambda: Users(IDS, most=2, beyond="drop"), "beyond must be one of"),
        (lambda: Users(IDS, most=2, gradient="median"), "gradient must be one of"),
        (lambda: IDS, "must be a description"),
    ],
)
def test_bad_users_are_refused_before_anything_is_released(users: Callable[[], Any], found: str) -> None:
    model, engine = model_of("positions"), PrivacyEngine(unit="user")
    with pytest.raises(ConfigurationError, match=found):
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data_of(), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            users=users(),
        )
    assert engine.ledger.steps == 0
    assert not engine.ledger.marks
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"padded": True, "physical_batch_size": 16}, "fixed shapes"),
        ({"physical_batch_size": "auto"}, "at least 4"),
        ({"physical_batch_size": MOST - 1}, "at least 4"),
    ],
)
def test_steps_that_cannot_hold_a_user_are_refused(options: dict[str, Any], found: str) -> None:
    model = model_of("positions")
    with pytest.raises(ConfigurationError, match=found):
        next(explicit(model, Users(IDS, most=MOST), **options))


def test_the_unit_and_the_mode_have_to_fit() -> None:
    model = model_of("positions")
    options = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(data_of(), batch_size=2),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "users": Users(IDS, most=MOST),
    }
    with pytest.raises(ConfigurationError, match='Give unit="user"'):
        PrivacyEngine().make_private(**options)
    with pytest.raises(ConfigurationError, match="grad_sample_mode='hooks'"):
        PrivacyEngine(unit="user").make_private(**options, grad_sample_mode="hooks")
    engine = PrivacyEngine(ledger=Ledger(unit=Unit.USER, relation=Relation.ZERO_OUT))
    _, optimizer, loader = engine.make_private(**options)
    with pytest.raises(ConfigurationError, match="at least 4"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer)


@pytest.mark.parametrize("door", ["explicit", "paper"])
def test_rows_in_another_order_are_refused_and_copies_are_known(door: str) -> None:
    model = model_of("positions")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    users = Users(IDS, most=MOST, gradient="sum")
    plain = copy.deepcopy(model)
    if door == "explicit":
        run: Any = PrivateStep(
            model,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(1.0), clipping=Flat(0.5), noise=Gaussian(0.0), steps=3),
            loss_per_example=loss,
            unit="user",
        )
        batches = run.batches(data_of(), users=users)
    else:
        run = PrivacyEngine(unit="user")
        _, _, batches = run.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data_of(), batch_size=USERS),
            noise_multiplier=0.0,
            max_grad_norm=0.5,
            users=users,
        )
    seen = taken(model, optimizer)

    def train(batch: Any) -> None:
        if door == "explicit":
            run(batch)
        else:
            F.cross_entropy(model(batch[1]), batch[2]).backward()
            optimizer.step()

    iterator = iter(batches)
    batch = next(iterator)
    train([t.clone() for t in batch])  # as on another device
    assert_exact({n: g * USERS for n, g in seen[-1].items()}, reference(plain, batch[0], "sum"))
    if door == "paper":
        iterator = iter(batches)
        batch = next(iterator)
        for changed in ([t.flip(0) for t in batch], [t[:-1] for t in batch], [batch[0], batch[1] + 1e-9, batch[2]]):
            with pytest.raises(ProtocolError, match=r"not certain whose records|rows, and the private loader"):
                train(changed)
    else:
        batch = next(iterator)
        apart = [batch[0], batch[1].flip(0), batch[2].flip(0)]  # one tensor is as it was
        for changed in ([t.flip(0) for t in batch], [t[:-1] for t in batch], apart):
            with pytest.raises(ProtocolError, match="not certain whose records"):
                train(changed)
    assert run.ledger.steps == len(seen) == 1
    train(batch)
    assert run.ledger.steps == len(seen) == 2


def test_the_report_knows_the_marks_by_the_words_that_training_writes() -> None:
    assert (USERS_MARK, ROWS_MARK) == (BY_USER, ROWS_TOO)
