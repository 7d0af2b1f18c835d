"""A model with a tensor parallel plan of every kind, of which some ranks hold parts."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.parallel.sharded_models import VOCABULARY

LENGTH = 4  # positions of each text but the last, which ranks share


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Feed(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Root(nn.Module):
    """A root mean square norm, written out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), Root(width)
        self.attention, self.feed = Attention(width), Feed(width, hidden)
        self.again = False

    def inner(self, x):
        x = x + self.attention(self.first(x))
        return x + self.feed(self.second(x))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


class Plain(nn.Module):
    """A language model whose positions, last norm and one more layer are in no plan."""

    def __init__(self, *, width=8, hidden=12, vocabulary=VOCABULARY, tied=False, again=False, padding=None):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList([Block(width, hidden)])
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.head.weight = self.table.weight
        for block in self.blocks:
            block.again = again

    def forward(self, ids):
        x = self.table(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model(**options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = Plain(**options)
        for p in made.parameters():  # norms and biases are not at one and zero
            p.data.add_(0.1 * torch.randn(p.shape))
        return made


COLUMNS = {
    "attention.q": ColwiseParallel(),
    "attention.k": ColwiseParallel(),
    "attention.v": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
    "feed.up": ColwiseParallel(),
    "feed.down": RowwiseParallel(),
}
SEQUENCE = {
    "first": SequenceParallel(),
    "second": SequenceParallel(),
    "attention": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "attention.q": ColwiseParallel(),
    "attention.k": ColwiseParallel(),
    "attention.v": ColwiseParallel(),
    "attention.out": RowwiseParallel(output_layouts=Shard(1)),
    "feed": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "feed.up": ColwiseParallel(),
    "feed.down": RowwiseParallel(output_layouts=Shard(1)),
}


def planned(made, mesh=None, *, sequence=False, embedding=None):
    """Lays a model out over a mesh, and returns it."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if mesh is None else mesh
    for block in made.blocks:
        parallelize_module(block, mesh, SEQUENCE if sequence else COLUMNS)
    if sequence:
        parallelize_module(
            made.blocks[0],
            mesh,
            PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True),
        )
        parallelize_module(made.norm, mesh, SequenceParallel())
    tables = {
        "rows": RowwiseParallel(input_layouts=Replicate()),
        "columns": ColwiseParallel(output_layouts=Replicate()),
    }
    plan = {"head": ColwiseParallel(input_layouts=Shard(1) if sequence else Replicate(), output_layouts=Replicate())}
    tied = made.head.weight is made.table.weight
    parallelize_module(made, mesh, plan if embedding is None else {**plan, "table": tables[embedding]})
    if tied:  # a plan puts another object in each place
        made.head.weight = made.table.weight
    return made


def both(made, **options):
    """Lays a model out over half of the ranks, and shards it over the others."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    # Said by torch of any model that ends in a linear layer on positions.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    planned(made, mesh["tp"], **options)
    for block in made.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(made, mesh=mesh["dp"])
    return made
