"""On two ranks users are parted, never their records: the steps are those of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from privet import ConfigurationError, Flat, Gaussian, Mechanism, Poisson, PrivateStep, Users
from privet.sampling import ShardedDataset
from tests.parallel.ranks import run
from tests.training.users import IDS, MOST, data_of, loss, model_of, seeded


def trained() -> tuple[dict[str, torch.Tensor], float, int]:
    model = model_of("positions")
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        mechanism=Mechanism(sampling=Poisson(0.6), clipping=Flat(0.5), noise=Gaussian(1.0), steps=4),
        loss_per_example=loss,
        unit="user",
        noise_generator=seeded(),
    )
    for batch in step.batches(data_of(), users=Users(IDS, most=MOST)):
        step(batch)
    return {n: p.detach() for n, p in model.named_parameters()}, step.epsilon(1e-3), step.ledger.steps


def scenario(rank: int, world: int, folder: object) -> object:
    model = nn.Linear(4, 3).double()
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        mechanism=Mechanism(sampling=Poisson(0.6), clipping=Flat(0.5), noise=Gaussian(1.0), steps=4),
        loss_per_example=loss,
        unit="user",
    )
    shards = ShardedDataset([12, 12], lambda shard: [data_of()[12 * shard + i] for i in range(12)])
    with pytest.raises(ConfigurationError, match="each user's records on one rank"):
        step.batches(shards, users=Users(IDS, most=MOST))
    return trained()


def test_two_ranks_take_the_steps_of_one_process() -> None:
    there, epsilon, steps = trained()
    for found, its_epsilon, its_steps in run(scenario):
        assert (its_epsilon, its_steps) == (epsilon, steps)
        for name, value in there.items():
            assert torch.allclose(found[name], value, rtol=0.0, atol=1e-12)
