"""Is everything billed that was released? The honest ε is computed apart, from what really ran."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from attacks.doors import Paper, rows
from attacks.table import Billed, Outcome, Unseen, attack
from privet import FileLedger, Flat, Gaussian, Ledger, Mechanism, Partition, PrivacyEngine, PrivateStep, PrivetError
from privet.accounting import (
    ComposedEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    get_epsilon,
    repeated,
)

KIND = "bill"
DELTA = 1e-5
DATA = TensorDataset(rows(32, 3))


def _net() -> nn.Module:
    return nn.Linear(3, 2)


def honest(event: Any) -> float:
    """Returns ε for zero-out neighbors, by the accountant that the doors of this page use."""
    try:
        return get_epsilon(event, DELTA, accountant="rdp", relation=Relation.ZERO_OUT)
    except PrivetError as error:  # or it would look as if the attack was stopped
        raise AssertionError(f"the honest ε could not be computed: {error}") from error


def paper(**options: Any) -> Paper:
    return Paper(_net(), DATA, noise=4.0, **options)


def train(run: Paper, batches: Iterable[Any]) -> int:
    """Trains on the batches, and returns how many there were."""
    steps = 0
    for (x,) in batches:
        run.step(run.net(x).square().mean())
        steps += 1
    return steps


def explicit(**options: Any) -> PrivateStep:
    net = _net()
    return PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        mechanism=Mechanism(
            sampling=Partition(shuffled=True, batch_size=8), clipping=Flat(1.0), noise=Gaussian(4.0), steps=5
        ),
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
        accountant="rdp",
        **options,
    )


def _passes(count: int) -> float:
    return honest(repeated(PartitionEvent(1, GaussianEvent(4.0)), count))


@attack(KIND, "a new partition loader for each epoch")
def _() -> Outcome:
    step = explicit()
    for _ in range(5):
        for batch in step.batches(DATA):
            step(batch)
    return Billed(step.epsilon(DELTA), _passes(5))


@attack(KIND, "two datasets that overlap, a partition of each")
def _() -> Outcome:
    step = explicit()
    for part in (Subset(DATA, range(24)), Subset(DATA, range(8, 32))):
        for batch in step.batches(part):
            step(batch)
    return Billed(step.epsilon(DELTA), _passes(2))


@attack(KIND, "a sequential pass, set back in the middle ten times")
def _() -> Outcome:
    run = paper(poisson_sampling=False)
    batches = iter(run.loader)
    train(run, [next(batches)])
    state = run.loader.state_dict()
    for _ in range(10):
        run.loader.load_state_dict(state)
        train(run, run.loader)  # the rest of the pass, again and again
    return Billed(run.engine.get_epsilon(DELTA), _passes(10))


def _views(views: int) -> Billed:
    run = paper()
    steps = 0
    for (x,) in run.loader:
        if len(x):
            run.step(run.net(torch.cat([x] * views)).square().mean())
            steps += 1
    return Billed(
        run.engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0 / views)), steps))
    )


@attack(KIND, "two views of each example as rows")
def _() -> Outcome:
    return _views(2)


@attack(KIND, "eight views of each example as rows")
def _() -> Outcome:
    return _views(8)


@attack(KIND, "sequences with time on axis 0, and batch_first left at True")
def _() -> Outcome:
    net = nn.Linear(3, 2)
    run = Paper(net, TensorDataset(rows(32, 5, 3)), noise=4.0)
    steps = 0
    for (x,) in run.loader:
        run.step(run.net(x.transpose(0, 1)).square().mean())  # each of 5 rows holds all examples
        steps += 1
    return Billed(run.engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0 / 5)), steps)))


@attack(KIND, "each batch trained on twice")
def _() -> Outcome:
    run = paper()
    steps = 2 * sum(train(run, [batch, batch]) // 2 for batch in run.loader)
    return Billed(run.engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0)), steps)))


@attack(KIND, "a loader read ahead")
def _() -> Outcome:
    run = paper()
    steps = train(run, list(run.loader))
    return Billed(run.engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0)), steps)))


@attack(KIND, "every other batch left out")
def _() -> Outcome:
    run, steps = paper(), 0
    for _ in range(3):
        for index, batch in enumerate(run.loader):
            steps += 1
            if index % 2:
                train(run, [batch])
    return Billed(run.engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0)), steps)))


@attack(KIND, "a shuffled loader that hopes for amplification")
def _() -> Outcome:
    run = paper(poisson_sampling=False, shuffle=True)
    train(run, run.loader)
    return Billed(run.engine.get_epsilon(DELTA), _passes(1))


@attack(KIND, "batches of an ordinary loader")
def _() -> Outcome:
    run = paper()
    steps = train(run, DataLoader(DATA, batch_size=8))
    return Billed(run.engine.get_epsilon(DELTA), honest(repeated(GaussianEvent(4.0), steps)))


@attack(KIND, "a weighted sampler")
def _() -> Outcome:
    net = _net()
    loader = DataLoader(DATA, batch_size=8, sampler=WeightedRandomSampler(torch.ones(32), 32))
    PrivacyEngine().make_private(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), data_loader=loader, noise_multiplier=4.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    return "nothing stopped it"


@attack(KIND, "a partition with dataset_size=")
def _() -> Outcome:
    paper(poisson_sampling=False, dataset_size=32)
    return "nothing stopped it"


@attack(KIND, "a partition's ε asked for adding or removing one")
def _() -> Outcome:
    ledger = Ledger(accountant="rdp", relation=Relation.ADD_OR_REMOVE_ONE)
    run = paper(engine=PrivacyEngine(ledger=ledger), poisson_sampling=False)
    train(run, run.loader)
    return Billed(run.engine.get_epsilon(DELTA), float("inf"))


@attack(KIND, "the engine's ledger replaced in mid-run", stopped_by=AttributeError)
def _() -> Outcome:
    run = paper()
    run.engine.ledger = Ledger()
    return "nothing stopped it"


@attack(KIND, "a file of steps behind a symbolic link")
def _() -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        real, link = Path(folder) / "ledger", Path(folder) / "link"
        first = FileLedger(real, accountant="rdp", relation=Relation.ZERO_OUT)
        link.symlink_to(real)
        second = FileLedger(link, accountant="rdp", relation=Relation.ZERO_OUT)
        for ledger in (first, second, first):
            ledger.begin(GaussianEvent(4.0))
        return Billed(min(first.epsilon(DELTA), second.epsilon(DELTA)), honest(repeated(GaussianEvent(4.0), 3)))


@attack(KIND, "a noise multiplier that is lowered for one step")
def _() -> Outcome:
    from dataclasses import replace

    run = paper()
    train(run, run.loader)
    update = run.engine._updates()[0]
    before = update.mechanism
    update.mechanism = replace(before, noise=before.noise.with_multiplier(1.0))
    train(run, [next(iter(run.loader))])
    update.mechanism = before
    event = ComposedEvent((repeated(PoissonEvent(0.25, GaussianEvent(4.0)), 4), PoissonEvent(0.25, GaussianEvent(1.0))))
    return Billed(run.engine.get_epsilon(DELTA), honest(event))


@attack(KIND, "no noise")
def _() -> Outcome:
    run = Paper(_net(), DATA, noise=0.0)
    train(run, run.loader)
    return Billed(run.engine.get_epsilon(DELTA), float("inf"))


@attack(KIND, "two networks on one engine")
def _() -> Outcome:
    engine = PrivacyEngine(accountant="rdp")
    steps = sum(train(run, run.loader) for run in (paper(engine=engine), paper(engine=engine)))
    return Billed(engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0)), steps)))


@attack("resume", "model and optimizer saved by their own state_dict")
def _() -> Outcome:
    first = paper(lr=0.1)
    train(first, first.loader)
    second = paper(lr=0.1)
    second.net.load_state_dict(first.net.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    steps = train(second, second.loader)
    event = repeated(PoissonEvent(0.25, GaussianEvent(4.0)), 2 * steps)
    found = Billed(second.engine.get_epsilon(DELTA), honest(event))
    if found.epsilon >= found.honest * (1 - 1e-6):
        return found
    return Unseen(
        "A checkpoint of one's own that holds model and optimizer",
        f"ε = {found.epsilon:.3g} is said after two runs that cost {found.honest:.3g}",
    )


@attack("resume", "the engine's state saved and loaded beside them")
def _() -> Outcome:
    first = paper()
    steps = train(first, first.loader)
    second = paper()
    second.engine.load_state_dict(first.engine.state_dict())
    steps += train(second, second.loader)
    return Billed(second.engine.get_epsilon(DELTA), honest(repeated(PoissonEvent(0.25, GaussianEvent(4.0)), steps)))


def _target(delta: float) -> Outcome:
    net = _net()
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private_with_epsilon(
        module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), data_loader=DataLoader(DATA, batch_size=8),
        target_epsilon=3.0, target_delta=delta, epochs=1, max_grad_norm=1.0,
    )  # fmt: skip
    return "nothing stopped it"


@attack(KIND, "a target δ of 1")
def _() -> Outcome:
    return _target(1.0)


@attack(KIND, "a target δ of 0")
def _() -> Outcome:
    return _target(0.0)
