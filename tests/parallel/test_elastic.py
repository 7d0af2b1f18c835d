"""A run that is saved on some number of ranks goes on with another number, as if it had never been broken off."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.parallel.models import digest, engine_on, net, step_on, weights
from tests.parallel.ranks import run

FILE, STATE, FOLDER = "run.pt", "loader.pt", "sharded"


def engine_run(folder, *, resume, steps, wrap=False):
    """Trains through the paper's door from a checkpoint if there is one, and saves another."""
    model = net()
    engine, model, optimizer, loader = engine_on(
        DistributedDataParallel(model) if wrap else model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
    )
    if resume:
        engine.load_checkpoint(folder / FILE, module=model, optimizer=optimizer)
        loader.load_state_dict(torch.load(folder / STATE))
    for x, y in itertools.islice(loader, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    if not resume:
        engine.save_checkpoint(folder / FILE, module=model, optimizer=optimizer)
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
            torch.save(loader.state_dict(), folder / STATE)
    return weights(model), engine.get_epsilon(1e-5), engine.ledger.state_dict()


def dcp_run(folder, *, resume):
    """Trains through the explicit door, with torch.distributed.checkpoint: here every rank gives its state."""
    model = net()
    step = step_on(model, seed=None)
    state = {"model": model.state_dict(), "optimizer": step.optimizer.state_dict(), "privet": step.state_dict()}
    if resume:
        first = torch.load(folder / "first.pt")
        state = {**state, "privet": first}  # torch loads in place, into a state of the saved one's structure
        dcp.load({"model": state["model"], "privet": state["privet"]}, checkpoint_id=folder / FOLDER)
        model.load_state_dict(state["model"])
        step.load_state_dict(state["privet"])
    for batch in step.batches(net_data()):
        step(batch)
    if not resume:
        state = {"model": model.state_dict(), "privet": step.state_dict()}
        dcp.save(state, checkpoint_id=folder / FOLDER)
        if torch.distributed.get_rank() == 0:
            torch.save(step.state_dict(), folder / "first.pt")
    return weights(model), step.epsilon(1e-5), step.ledger.steps


def net_data():
    from tests.parallel.models import data

    return data()


def saving(rank, world, _, folder):
    return engine_run(folder, resume=False, steps=3, wrap=True), dcp_run(folder, resume=False)


def resuming(rank, world, _, folder):
    return engine_run(folder, resume=True, steps=100), dcp_run(folder, resume=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the results of 4 ranks that trained and saved, and of 2 that resumed, or of one process."""
    folder = tmp_path_factory.mktemp("elastic")
    first = run(saving, folder, world=4)
    return first, run(resuming, folder, world=2), engine_run(folder, resume=True, steps=100)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return engine_run(tmp_path_factory.mktemp("unbroken"), resume=False, steps=100)


def test_a_run_goes_on_with_half_the_ranks_or_alone_as_if_it_had_not_been_broken_off(runs, unbroken):
    _, resumed, alone = runs
    moved = (unbroken[0] - weights(net())).norm()
    for there, epsilon, _ in [alone, *(found[0] for found in resumed)]:
        assert (there - unbroken[0]).norm() < 2e-6 * moved
        assert epsilon == pytest.approx(unbroken[1], rel=1e-3)
    assert len({digest(found[0][0]) for found in resumed}) == 1


def test_all_ranks_give_the_state_of_one_ledger_which_counts_once_when_it_is_loaded(runs):
    first, resumed, _ = runs
    for found in (first, resumed):
        states = [each[0][2] for each in found]
        assert all(state == states[0] for state in states)
    steps = [
        sum(phase["count"] for phases in found[0][0][2]["runs"].values() for phase in phases) for found in runs[:2]
    ]
    assert steps == [3, 5]


def test_torchs_own_distributed_checkpoint_carries_the_bill_to_another_number_of_ranks(runs):
    first, resumed, _ = runs
    assert {found[1][2] for found in first} == {10}
    assert {found[1][2] for found in resumed} == {20}
    assert first[0][1][1] < resumed[0][1][1]
    assert len({digest(found[1][0]) for found in resumed}) == 1
