"""Two ranks with correlated or discrete noise train as one process does, each with buffers for its own shard alone."""

from __future__ import annotations

import math

import pytest
import torch

from privet import Flat, Mechanism, Partition
from privet.accounting import CorrelatedEvent, PartitionEvent
from privet.noise import BandMF, DiscreteGaussian, LambdaCGD
from tests.parallel.ranks import run
from tests.parallel.sharded_models import language, sharded, step_on_texts, texts, whole

NOISES = {
    "bands": BandMF(1.0, (1.0, 0.6, 0.3)),
    "lambda": LambdaCGD(1.0, 0.8),
    "discrete": DiscreteGaussian(1.0),
}


def trained(prepare, noise):
    data = texts()
    model = prepare(language(simple=True))
    what = Mechanism(
        sampling=Partition(batch_size=math.ceil(len(data) / 3), dataset_size=len(data)),
        clipping=Flat(1.0),
        noise=noise,
        steps=2,
    )
    step = step_on_texts(model, what=what)
    loader = step.batches(data)
    for _ in range(2):
        for batch in loader:
            step(batch)
    inner = getattr(step._update.noise, "_inner", step._update.noise)
    kept = getattr(inner.source, "_kept", None)
    held = 0 if kept is None else sum(row.numel() for rows in kept.rows for row in rows.values())
    return {
        "parameters": {name: whole(p) for name, p in model.named_parameters()},
        "event": step.ledger.event(),
        "held": held,
    }


def scenario(rank, world, folder):
    plain = {name: trained(lambda model: model, noise) for name, noise in NOISES.items()}
    parts = {name: trained(sharded, noise) for name, noise in NOISES.items()}
    return {"whole models": plain, "shards": parts}


@pytest.fixture(scope="module")
def ranks():
    return run(scenario)


@pytest.fixture(scope="module")
def alone():
    return {name: trained(lambda model: model, noise) for name, noise in NOISES.items()}


@pytest.mark.parametrize("how", ["whole models", "shards"])
@pytest.mark.parametrize("name", NOISES)
def test_ranks_train_as_one_process(ranks, alone, how, name):
    for found in ranks:
        for parameter, value in alone[name]["parameters"].items():
            assert torch.allclose(found[how][name]["parameters"][parameter], value, rtol=1e-3, atol=1e-4)
        assert isinstance(found[how][name]["event"], PartitionEvent if name == "discrete" else CorrelatedEvent)
        assert found[how][name]["event"] == alone[name]["event"]


@pytest.mark.parametrize("name", NOISES)
def test_each_rank_keeps_buffers_for_its_own_elements(ranks, alone, name):
    total = alone[name]["held"]
    held = [found["shards"][name]["held"] for found in ranks]
    assert sum(held) == total
    assert (max(held) < total) == (total > 0)
