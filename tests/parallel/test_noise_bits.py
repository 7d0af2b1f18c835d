"""With one key the noise is the same to the last bit, however many ranks draw it, and whatever each of them holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from privet.gradients.clipped_sum import ClippedSum
from privet.noise import GaussianNoise, NoiseKey, SecureNoise
from privet.parallel import ranks_for
from tests.parallel.models import digest
from tests.parallel.ranks import run
from tests.parallel.sharded_models import whole


class Parameters(nn.Module):
    """Of odd sizes, so that parts begin anywhere, and one that is drawn in several chunks."""

    def __init__(self):
        super().__init__()
        self.large = nn.Parameter(torch.zeros(301, 501))
        self.deep = nn.Parameter(torch.zeros(5, 12, 3))
        self.bias = nn.Parameter(torch.zeros(7))
        self.scalar = nn.Parameter(torch.zeros(1))


PLANS = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}


def planned(mesh, placement):
    module = Parameters()
    for name, p in list(module.named_parameters()):
        wanted = placement if not isinstance(placement, Shard) or p.dim() > placement.dim else Replicate()
        setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [wanted])))
    return module


def sharded(module, **options):
    fully_shard(module, **options)
    return module


def second_axis(p):
    return Shard(1) if p.dim() > 2 else None  # only axes that divide can be cut so


def key():
    return NoiseKey.from_generator(torch.Generator().manual_seed(5))


def drawn(module):
    """Returns the bits of the noise that all ranks together add to a sum of zeros."""
    ranks = ranks_for(module)
    named = dict(module.named_parameters())
    zeros = {n: torch.zeros_like(p.to_local() if hasattr(p, "to_local") else p.detach()) for n, p in named.items()}
    mechanism = ranks.noise(GaussianNoise(SecureNoise(ranks.key(key()))))
    released = mechanism.release(ClippedSum(zeros, 0.7), multiplier=1.5, step=3).values
    return {n: digest(whole(ranks.gradient(named[n], released[n]))) for n in named}


def scenario(rank, world, folder):
    found = {"replicated": drawn(Parameters())}
    if world == 1:
        return found
    flat = init_device_mesh("cpu", (world,))
    found["sharded"] = drawn(sharded(Parameters()))
    found["sharded by columns"] = drawn(sharded(Parameters(), shard_placement_fn=second_axis))
    found |= {f"plan of {name}": drawn(planned(flat, placement)) for name, placement in PLANS.items()}
    if world == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found["hybrid"] = drawn(sharded(Parameters(), mesh=two))
        for name, placement in PLANS.items():
            found[f"sharded, over a plan of {name}"] = drawn(sharded(planned(two["tp"], placement), mesh=two["dp"]))
    return found


def steady(function):
    """Returns whether a function of torch rounds a value alike wherever it lies in a tensor."""
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = [function(values[start:stop].clone()) for start, stop in ((1, 4001), (3, 100), (17, 2002))]
    all_of_it = function(values)
    return all(map(torch.equal, at, (all_of_it[1:4001], all_of_it[3:100], all_of_it[17:2002])))


@pytest.mark.skipif(
    not all(map(steady, (torch.log, torch.sin, torch.cos))),
    reason="here, torch rounds a logarithm by where its argument lies, so that no two shards can have the same bits",
)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_noise_is_the_same_to_the_last_bit(world):
    alone = Parameters()
    zeros = {name: torch.zeros_like(p) for name, p in alone.named_parameters()}
    released = GaussianNoise(SecureNoise(key())).release(ClippedSum(zeros, 0.7), multiplier=1.5, step=3).values
    wanted = {name: digest(released[name]) for name, _ in alone.named_parameters()}
    assert len({bits[:4] for bits in wanted.values()}) == len(wanted)
    ranks = run(scenario, world=world)
    assert len(ranks[0]) == {1: 1, 2: 6, 4: 10}[world]
    for found in ranks:
        for way, noise in found.items():
            assert noise == wanted, way
