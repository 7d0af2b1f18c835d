"""An operation of a sharded model that was never looked at: all ranks look at the batch of each that met it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from privet import Performance
from tests.parallel.ranks import run
from tests.parallel.sharded_models import apart, engine_on_texts, language, loop, sharded, step_on_texts, texts, whole

pytestmark = pytest.mark.deep  # it takes half a minute


class Late(nn.Module):
    """A language model with one layer more, which takes part only while it is told to. It sees (T, B, width)."""

    def __init__(self):
        super().__init__()
        self.inner = language(simple=True)
        self.blocks = self.inner.blocks
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.late = nn.Linear(6, 6)
        self.use = False

    def forward(self, ids):
        x = self.inner.table(ids)
        if self.use:
            x = self.late(x.transpose(0, 1)).transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.inner.head(x)


def explicit(model, *, late, **options):
    step = step_on_texts(model, **options)
    for index, batch in enumerate(itertools.islice(step.batches(texts()), 4)):
        model.use = late and index >= 2
        step(batch)
    return {n: whole(p) for n, p in model.named_parameters()}


def paper(model, *, late):
    _, model, optimizer, loader = engine_on_texts(model)
    for index, batch in enumerate(itertools.islice(loader, 4)):
        model.use = late and index >= 2
        loop(model, optimizer, [batch])
    return {n: whole(p) for n, p in model.named_parameters()}


WAYS = {
    "explicit": explicit,
    "two passes": lambda model, late: explicit(model, late=late, performance=Performance(passes=2)),
    "paper": paper,
}


def scenario(rank, world, folder):
    found = {way: train(sharded(Late()), late=True) for way, train in WAYS.items()}
    return found, {way: train(sharded(Late()), late=rank == 1) for way, train in WAYS.items()}


@pytest.fixture(scope="module")
def ranks():
    return run(scenario)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:the loader:UserWarning")
def test_a_layer_that_all_ranks_meet_late_is_looked_at_and_the_run_goes_where_one_process_goes(ranks, way):
    start = {name: whole(p) for name, p in Late().named_parameters()}
    there = WAYS[way](Late(), late=True)
    moved, _ = apart(start, there)
    for found, _ in ranks:
        assert apart(found[way], there)[0] < 2e-6 * moved


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_one_rank_meets_alone_is_looked_at_by_both_and_nothing_hangs(ranks, way):
    never, always = WAYS[way](Late(), late=False), WAYS[way](Late(), late=True)
    (_, one), (_, other) = ranks
    assert apart(one[way], other[way])[0] == 0.0
    for elsewhere in (never, always):  # half of the examples took the late layer
        assert apart(one[way], elsewhere)[0] > 1e-4
