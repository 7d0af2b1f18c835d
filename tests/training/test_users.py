"""Users with several records: drawn as a whole, clipped as a whole, and billed as one unit, at both doors.

The law is one user at a time: plain autograd in float64 on all records of the user that are in the batch.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Partition,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    RandomAllocation,
    Sampling,
    Users,
)
from privet.accounting import Ledger, Relation, Unit, get_epsilon
from privet.gradients import by_owner as regrouping
from privet.gradients import gathered as gathering
from privet.gradients.reference import reference_sum
from privet.training.whose import ROWS_MARK, USERS_MARK
from tests.contracts.doors import assert_exact, expected_sum, taken

RECORDS, T, D = 24, 4, 4  # positions and features coincide
IDS = torch.tensor([5, 2, 2, 9, 5, 5, 5, 7, 9, 2, 5, 1, 1, 1, 3, 5, 9, 9, 9, 2, 7, 1, 5, 5])  # users of 1 to 8 records
USERS, MOST, RATE = 6, 4, 0.6
RANDOM = torch.Generator().manual_seed(4)
X = torch.randn(RECORDS, T, D, generator=RANDOM, dtype=torch.float64)
Y = torch.randint(3, (RECORDS,), generator=RANDOM)
pytestmark = pytest.mark.filterwarnings("ignore:noise_multiplier is 0", "ignore:.*protects nobody")


class Tied(nn.Module):
    """A table that is also the last layer, and a vector that is added to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, D))
        self.place = nn.Parameter(torch.randn(T, D))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] > 0).long() + (x[..., 1] > 0).long()
        return F.linear(torch.tanh(F.embedding(ids, self.table) + self.place).mean(1), self.table)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "positions": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Flatten(), nn.Linear(T * D, 3, bias=False)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(T, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * D, 3)
    ),
    "tied": Tied,
    "recurrent": lambda: nn.Sequential(nn.LayerNorm(D), Last(nn.GRU(D, 3, batch_first=True))),
}


class Last(nn.Module):
    """A recurrent layer's last position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def data_of(x: Tensor = X) -> TensorDataset:
    return TensorDataset(torch.arange(RECORDS), x, Y)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[1]), batch[2], reduction="none")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def explicit(model: nn.Module, users: Users, data: Any = None, **options: Any) -> Iterator[tuple[Tensor, dict]]:
    """Yields the records of each batch, and the sum that the optimizer was handed, at the explicit door."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(RATE), clipping=Flat(0.5), noise=Gaussian(0.0), steps=4),
        loss_per_example=loss,
        performance=Performance(**options),
        unit="user",
        noise_generator=seeded(),
    )
    seen = taken(model, optimizer)
    for batch in step.batches(data_of() if data is None else data, users=users):
        step(batch)
        yield batch[0], {n: g * RATE * USERS for n, g in seen[-1].items()}


def paper(
    model: nn.Module, users: Users, data: Any = None, *, most: int | None = None, accumulate: int = 1
) -> Iterator[tuple[Tensor, dict]]:
    """Yields the same at the paper's door; `most` for virtual steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = PrivacyEngine(unit="user")
    _, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data_of() if data is None else data, batch_size=4 // accumulate),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        accumulate=accumulate,
        noise_generator=seeded(),
        users=users,
    )
    seen = taken(model, optimizer)
    records: list[Tensor] = []

    def run(batches: Any, steps: Callable[[], bool]) -> Iterator[tuple[Tensor, dict]]:
        for index, x, y in batches:
            records.append(index)
            losses = F.cross_entropy(model(x), y, reduction="none")
            (losses.sum() / max(len(x), 1) / accumulate).backward()
            if steps():
                optimizer.step()
                optimizer.zero_grad()
                yield torch.cat(records), {n: g * 4 for n, g in seen[-1].items()}
                records.clear()
            elif accumulate == 1:
                optimizer.step()

    for _ in range(2):  # passes of two steps
        if most is not None:
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=most, optimizer=optimizer) as parts:
                yield from run(parts, lambda: parts.last)
        else:
            yield from run(loader, lambda: len(records) == accumulate)


def reference(model: nn.Module, records: Tensor, gradient: str, x: Tensor = X, norm: float = 0.5) -> Any:
    """Returns the clipped sum, one user at a time."""
    names = [n for n, _ in model.named_parameters()]
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    for user in IDS[records].unique():
        own = records[IDS[records] == user]
        losses = F.cross_entropy(model(x[own]), Y[own], reduction=gradient)
        found = torch.autograd.grad(losses, list(model.parameters()))
        for n, g in zip(names, found, strict=True):
            rows[n].append(g)
    return expected_sum({n: torch.stack(r) for n, r in rows.items()}, Flat(norm))


def check(model: nn.Module, taken_steps: Iterator[tuple[Tensor, dict]], gradient: str) -> list[Tensor]:
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


# -- one user at a time --------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[..., Iterator[tuple[Tensor, dict]]]] = {
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
            staticmethod(lambda index, *, average, device: regrouping.Owner(len(index))),
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


# -- what one user can do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", [explicit, paper])
def test_a_user_moves_the_sum_by_the_clip_norm_at_most(door: Callable[..., Iterator[tuple[Tensor, dict]]]) -> None:
    users = Users(IDS, most=MOST, gradient="sum")

    def sums(x: Tensor) -> list[dict]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(T * D, 3, bias=False)).double()
        return [total for _, total in door(model, users, data_of(x))]

    before, most = sums(X), 0.0
    for user in (5, 2, 9):
        own = (IDS == user).view(-1, 1, 1)
        for other, far in ((X.masked_fill(own, 0.0), 0.5), (torch.where(own, 1e3 * X, X), 1.0)):  # zero-out; replaced
            moved = [
                float(sum((a[n] - b[n]).square().sum() for n in a)) ** 0.5
                for a, b in zip(before, sums(other), strict=True)
            ]
            assert max(moved) <= far * (1 + 1e-9)
            most = max(most, max(moved) / far)
    assert most > 0.99, "the bound is attained"


# -- who is drawn --------------------------------------------------------------------------------------------------------


def batches_of(users: Users, sampling: Sampling, passes: int = 60) -> list[Tensor]:
    from privet.sampling import loader_for

    loader = loader_for(TensorDataset(torch.arange(RECORDS)), sampling=sampling, users=users)
    return [batch[0] for _ in range(passes) for batch in loader]


def test_users_are_drawn_and_their_records_with_them() -> None:
    batches = batches_of(Users(IDS, most=MOST), Poisson(RATE), passes=60)
    met, counts = torch.zeros(RECORDS), {int(user): int((IDS == user).sum()) for user in IDS.unique()}
    together = 0
    for records in batches:
        users, sizes = IDS[records].unique(return_counts=True)
        assert all(int(n) == min(MOST, counts[int(user)]) for user, n in zip(users, sizes, strict=True))
        met[records] += 1
        together += len(users)
    assert together == pytest.approx(RATE * USERS * len(batches), rel=0.15)
    for user, count in counts.items():  # all records of a user beyond the bound have their turn
        expected = RATE * len(batches) * min(MOST, count) / count
        assert (met[IDS == user] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize(
    "sampling",
    [RandomAllocation(3), Partition(shuffled=True, batch_size=2)],
    ids=lambda sampling: type(sampling).__name__,
)
def test_other_samplings_draw_users_too(sampling: Sampling) -> None:
    batches = batches_of(Users([f"user {i}" for i in IDS.tolist()], most=8), sampling, passes=2)
    assert len(batches) == 6
    for three in (batches[:3], batches[3:]):  # each user is in one batch of a pass, with all records
        assert sorted(torch.cat(three).tolist()) == list(range(RECORDS))
        assert sum(len(IDS[records].unique()) for records in three) == USERS


def test_ranks_share_users_and_not_their_records() -> None:
    from privet.noise import NoiseKey
    from privet.sampling.sampler import LogicalBatches
    from privet.sampling.share import Share
    from privet.sampling.users import UsersRecords

    def drawn(rank: int, ranks: int) -> list[list[int]]:
        batches = LogicalBatches(
            Poisson(RATE),
            key=NoiseKey.from_generator(seeded()),
            size=USERS,
            steps=20,
            share=Share(rank, ranks),
            users=UsersRecords(Users(IDS, most=MOST), RECORDS),
        )
        run = batches.begin()
        parts = iter(run.draw())
        found: list[list[int]] = [[] for _ in range(20)]
        for records in parts:
            last = run.drawn[-1]
            found[last.place] = records
            assert last.owner is not None
            users = IDS[records]
            assert all(
                (users[i] == users[j]) == (last.owner[i] == last.owner[j]) for i in range(len(users)) for j in range(i)
            )
        assert len({one.digest for one in run.drawn}) > 10 or ranks == 1
        return found

    whole, shares = drawn(0, 1), [drawn(rank, 3) for rank in range(3)]
    for all_of_them, *parts in zip(whole, *shares, strict=True):
        assert sorted(sum(parts, [])) == sorted(all_of_them)
        users = [set(IDS[part].tolist()) for part in parts]
        assert sum(map(len, users)) == len(set().union(*users)), "each user is on one rank"


# -- what it costs -------------------------------------------------------------------------------------------------------


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


# -- what is refused -----------------------------------------------------------------------------------------------------


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
            with pytest.raises(ProtocolError, match="not certain whose records|rows, and the private loader"):
                train(changed)
    else:
        batch = next(iterator)
        for changed in ([t.flip(0) for t in batch], [t[:-1] for t in batch]):
            with pytest.raises(ProtocolError, match="not certain whose records"):
                train(changed)
    assert run.ledger.steps == len(seen) == 1
    train(batch)
    assert run.ledger.steps == len(seen) == 2
