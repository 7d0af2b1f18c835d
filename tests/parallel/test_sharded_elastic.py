"""A sharded run that is saved on some number of ranks goes on with another number, as if it had not been broken off."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.parallel.ranks import run
from tests.parallel.sharded_models import apart, engine_on_texts, language, loop, said, sharded, whole

pytestmark = pytest.mark.deep  # it takes half a minute

FOLDER, REST = "sharded", "rest.pt"


def a_run(folder, *, resume, steps):
    """Trains from a checkpoint if there is one to resume, else for some steps, and saves one."""
    model = sharded(language())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    if resume:  # before make_private: torch makes room for the optimizer's state by a step on gradients of zero
        states = get_state_dict(model, optimizer)
        dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / FOLDER)
        set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    engine, model, optimizer, loader = engine_on_texts(model, optimizer=optimizer)
    if resume:
        rest = torch.load(folder / REST)
        engine.load_state_dict(rest["engine"])
        loader.load_state_dict(rest["loader"])
    loop(model, optimizer, itertools.islice(loader, steps))
    if not resume:
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / FOLDER)
        if torch.distributed.get_rank() == 0:
            torch.save({"engine": engine.state_dict(), "loader": loader.state_dict()}, folder / REST)
    held = {tuple(state["exp_avg"].to_local().shape) for state in optimizer.state.values()}
    return *said(engine, model), held


def saving(rank, world, _, folder):
    return a_run(folder, resume=False, steps=3)


def resuming(rank, world, _, folder):
    return a_run(folder, resume=True, steps=100)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return run(saving, folder, world=3), run(resuming, folder, world=2)


@pytest.fixture(scope="module")
def unbroken():
    engine, model, optimizer, loader = engine_on_texts(language())
    loop(model, optimizer, loader)
    return said(engine, model)


def test_a_run_of_three_ranks_goes_on_with_two(runs, unbroken):
    start = {name: whole(p) for name, p in language().named_parameters()}
    moved, _ = apart(start, unbroken[0])
    for found in runs[1]:
        assert apart(found[0], unbroken[0])[0] < 2e-6 * moved
        assert found[1] == pytest.approx(unbroken[1], rel=1e-3)
        assert found[2] == unbroken[2] == 5
    assert {found[2] for found in runs[0]} == {3}


def test_each_rank_holds_its_part_of_the_optimizers_state_alone(runs):
    for found, rows in ((runs[0][0], 4), (runs[1][0], 6)):  # of the 11 rows of the table and of the head
        assert {shape[0] for shape in found[4] if len(shape) == 2 and shape[1] == 6} >= {rows}
        assert all(shape[0] < 11 for shape in found[4])
