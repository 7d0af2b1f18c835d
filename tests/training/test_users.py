"""Users with several records: drawn as a whole, clipped as a whole, and billed as one unit, at both doors.

The law is one user at a time: plain autograd in float64 on all records of the user that are in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BandMF,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Noise,
    Partition,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    RandomAllocation,
    Sampling,
    Users,
)
from privet.accounting import ComposedEvent, GaussianEvent, get_epsilon
from privet.gradients import by_owner as regrouping
from privet.gradients import gathered as gathering
from privet.gradients.use import Owner
from privet.schedules import Schedule, Stepwise
from tests.contracts.doors import assert_exact, taken
from tests.training.users import IDS, MODELS, MOST, USERS, D, T, X, data_of, explicit, loss, model_of, paper, reference

Steps = Iterator[tuple[Tensor, dict]]


def check(model: nn.Module, taken_steps: Steps, gradient: str) -> list[Tensor]:
    """Compares every step with the reference, and returns the records of each."""
    steps, plain = [], copy.deepcopy(model)  # before it is private
    for records, total in taken_steps:
        steps.append(records)
        if len(records):
            assert_exact(total, reference(plain, records, gradient))
        else:
            assert all(not g.any() for g in total.values())
    assert max(map(len, steps)) > MOST, "batches of several users with several records"
    return steps


# -- one user at a time --------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[..., Steps]] = {
    "explicit": explicit,
    "two passes": lambda model, users: explicit(model, users, passes=2),
    "physical batches": lambda model, users: explicit(model, users, physical_batch_size=MOST + 1),
    "paper": paper,
    "virtual steps": lambda model, users: paper(model, users, most=MOST),
    "accumulated": lambda model, users: paper(model, users, accumulate=2),
}


PAIRS = [(name, way) for name in MODELS for way in WAYS if name == "tied" or way in ("explicit", "two passes", "paper")]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_each_user_is_clipped_as_a_whole(name: str, way: str) -> None:
    gradient = "mean" if len(name + way) % 2 else "sum"  # each model and each way meets both
    model = model_of(name)
    check(model, WAYS[way](model, Users(IDS, most=MOST, gradient=gradient)), gradient)


def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> bool:
        model = model_of("positions")
        try:
            check(model, explicit(model, Users(IDS, most=MOST, gradient="sum")), "sum")
        except AssertionError:
            return True
        return False

    assert not fails()
    places = regrouping._places
    with monkeypatch.context() as patch:  # rows of the next user
        patch.setattr(regrouping, "_places", lambda owner, units: places(owner.roll(1), units))
        assert fails()
    with monkeypatch.context() as patch:  # each record clipped by itself
        patch.setattr(gathering, "by_owner", lambda recorded, owner: recorded)
        patch.setattr(
            "privet.gradients.use.Owner.of_rows",
            staticmethod(lambda index, *, average, device: Owner(len(index))),
        )
        assert fails()
    rows = gathering.row_norms
    with monkeypatch.context() as patch:  # inner products of a user's records left away
        patch.setattr("privet.gradients.rules.linear.Linear.sequences", False)

        def squares(self: Any, units: slice) -> Tensor:
            uses = self.direct[0]
            repeat = uses.rows // self.units
            apart = rows(uses.rule.per_example(uses.narrowed(units.start * repeat, units.stop * repeat)))
            return apart.view(-1, repeat).sum(1)

        patch.setattr(gathering.Gathered, "norms_of", squares)
        assert fails()


# -- what one user can do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [explicit, paper])
def test_a_user_moves_the_sum_by_the_clip_norm_at_most(door: Callable[..., Steps]) -> None:
    users = Users(IDS, most=MOST, gradient="sum")

    def sums(x: Tensor) -> list[dict]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(T * D, 3, bias=False)).double()
        return [total for _, total in door(model, users, data_of(x))]

    before, most = sums(X), 0.0
    for user in (5, 2, 9):
        own = (user == IDS).view(-1, 1, 1)
        for other, far in ((X.masked_fill(own, 0.0), 0.5), (torch.where(own, 1e3 * X, X), 1.0)):  # zero-out; replaced
            moved = [
                float(sum((a[n] - b[n]).square().sum() for n in a)) ** 0.5
                for a, b in zip(before, sums(other), strict=True)
            ]
            assert max(moved) <= far * (1 + 1e-9)
            most = max(most, max(moved) / far)
    assert most > 0.99, "the bound is attained"


@pytest.mark.parametrize("door", [explicit, paper])
def test_a_user_with_a_record_that_is_not_finite_adds_nothing(door: Callable[..., Steps]) -> None:
    x = torch.where((torch.arange(len(X)) == 9).view(-1, 1, 1), torch.inf, X)  # a record of user 2, who has four
    model = model_of("convolution")
    plain, met = copy.deepcopy(model), 0
    for records, total in door(model, Users(IDS, most=MOST, gradient="sum"), data_of(x)):
        others = records[IDS[records] != 2]
        met += len(records) - len(others)
        if len(others):
            assert_exact(total, reference(plain, others, "sum"))
    assert met


@pytest.mark.parametrize("name", ["linear", "convolution", "normalization"])
def test_records_that_cancel_stay_within_the_clip_norm(name: str) -> None:
    """In float32, the sum of a user's records is 1e-4 of its terms, which two sums round differently."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, T, D, generator=generator).mul(1e5).repeat(1, 2, 1, 1).flatten(0, 1)
    x = x + torch.randn(x.shape, generator=generator)
    signs, ids = torch.tensor([1.0, -1.0]).repeat(8), torch.arange(8).repeat_interleave(2)
    layers = {"linear": nn.Linear(D, 3), "convolution": nn.Conv1d(T, 3, 3), "normalization": nn.LayerNorm((T, D))}
    layer = layers[name]
    far = 1e5 if name == "normalization" else 1.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    step = PrivateStep(
        layer,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(1 / 8), clipping=Flat(1.0), noise=Gaussian(0.0), steps=16),
        loss_per_example=lambda model, batch: (model(batch[0]).flatten(1) * far).sum(1) * batch[1],
        unit="user",
        noise_generator=torch.Generator().manual_seed(0),
    )
    seen, norms = taken(layer, optimizer), []
    for batch in step.batches(TensorDataset(x, signs), users=Users(ids, most=2, gradient="sum")):
        step(batch)
        if len(batch[0]) == 2:  # one user alone; the divisor is 1
            norms.append(float(sum(g.double().square().sum() for g in seen[-1].values())) ** 0.5)
    assert norms
    assert max(norms) <= 1.0, norms


# -- with what else there is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "noise"),
    [
        (RandomAllocation(3), Gaussian(1.0)),
        (Partition(batch_size=2, dataset_size=USERS), BandMF(1.0, (1.0, 0.5))),
    ],
    ids=["random allocation", "correlated noise"],
)
def test_passes_over_users_are_billed_as_the_plan_says(sampling: Sampling, noise: Noise) -> None:
    model = model_of("positions")
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=sampling, clipping=Flat(1.0), noise=noise, steps=2),
        loss_per_example=loss,
        unit="user",
    )
    loader = step.batches(data_of(), users=Users(IDS, most=8))
    for _ in range(2):
        assert sum(len(step(batch)) for batch in loader) == len(IDS)
    assert step.ledger.steps == 2
    assert step.epsilon(1e-3) == step.mechanism.epsilon(1e-3)


def test_a_rate_may_be_scheduled_and_a_run_resumed(tmp_path: Path) -> None:
    def begun(most: int = MOST) -> Any:
        model, engine = model_of("positions"), PrivacyEngine(unit="user")
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data_of(), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            users=Users(IDS, most=most),
        )
        return engine, model, optimizer, loader, Schedule(optimizer, rate=Stepwise(1, 0.5))

    engine, model, optimizer, loader, schedule = begun()
    for _ in range(2):
        for _, x, y in loader:
            F.cross_entropy(model(x), y, reduction="mean" if len(x) else "sum").backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    one = GaussianEvent(1.0)
    billed = ComposedEvent((Poisson(1 / 3).event_for(one, 3), Poisson(1 / 6).event_for(one, 3)))
    assert engine.epsilon(1e-3) == pytest.approx(get_epsilon(billed, 1e-3), rel=1e-3)
    engine.save_checkpoint(tmp_path / "run", module=model, optimizer=optimizer)
    again, other, its_optimizer, *_ = begun()
    again.load_checkpoint(tmp_path / "run", module=other, optimizer=its_optimizer)
    assert again.epsilon(1e-3) == engine.epsilon(1e-3)
    assert again.ledger.marks == engine.ledger.marks
    plain = begun()[3].state_dict()
    begun()[3].load_state_dict(plain)
    with pytest.raises(ConfigurationError, match="most=4"):
        begun(most=5)[3].load_state_dict(plain)
