"""Two ranks follow a stream of shards, and a schedule, as one process does."""

from __future__ import annotations

import pytest
import torch

from privet import ConfigurationError, DrawnSchedule, Flat, Gaussian, Mechanism, Poisson, PrivateStep, Stream
from privet.errors import RanksError
from privet.sampling import ShardedStream, draw_schedule
from tests.parallel.ranks import run

SIZES, BATCH, KEY = [7, 4, 9], 6, bytes(range(32))
DATA = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(1))
PARTS = DATA.split(SIZES)


def trained(sampling, data, *, steps):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=sampling, clipping=Flat(1.0), noise=Gaussian(1.0), steps=steps),
        loss_per_example=lambda model, batch: model(batch).square().sum(1),
        noise_generator=torch.Generator().manual_seed(7),
    )
    loader, seen = step.batches(data), []
    for batch in loader:
        seen.append(len(batch))
        step(batch)
    return model.weight.detach().clone(), step.ledger.event(), seen


def of_shards():
    return trained(Stream(BATCH, len(DATA)), ShardedStream(SIZES, lambda s: iter(PARTS[s])), steps=1)


def of_schedule(folder):
    schedule = DrawnSchedule.open(folder / "schedule")
    return trained(schedule, list(DATA), steps=schedule.steps)


def scenario(rank, world, folder):
    if rank == 0:
        draw_schedule(folder / "schedule", Poisson(0.25), dataset_size=len(DATA), passes=2, key=KEY)
    torch.distributed.barrier()
    found = [of_shards(), of_schedule(folder)]
    used = DrawnSchedule.open(folder / "schedule").used
    with pytest.raises((RanksError, ConfigurationError), match="2 ranks with a stream of one part"):
        trained(Stream(BATCH, len(DATA)), iter(DATA), steps=1)
    return found, used


def test_ranks_train_as_one_process(tmp_path):
    draw_schedule(tmp_path / "schedule", Poisson(0.25), dataset_size=len(DATA), passes=2, key=KEY)
    alone = [of_shards(), of_schedule(tmp_path)]
    returned = run(scenario)
    assert [used for _, used in returned] == [8, 8]
    results = [found for found, _ in returned]
    for found in results:
        for (weight, event, _), (expected, billed, _) in zip(found, alone, strict=True):
            assert torch.allclose(weight, expected, rtol=1e-4, atol=1e-5)
            assert event == billed
    for i in range(2):  # the shares of each batch are the whole batch
        assert [sum(sizes) for sizes in zip(*(found[i][2] for found in results), strict=True)] == alone[i][2]
