"""Trains a small language model under a privacy budget, each of its layers computed by several processes together.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --data-parallel 2

A plan of `torch.distributed.tensor.parallel` says which layers are computed in parts. With --data-parallel N there are
N groups of processes, which train on N shares of each batch: fully_shard then cuts what the plan leaves to each process
once more. The lines that privet needs are those of any other run, in this order: the process group, the plan,
fully_shard (or not), the optimizer, PrivateStep.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
from torch.utils.data import TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

DELTA = 1e-4
WORDS, LENGTH, WIDTH = 64, 16, 64
EXAMPLES, RATE, STEPS, CLIP_NORM = 4096, 0.125, 48, 0.5


class Block(nn.Module):
    """A norm, and a layer that mixes each word with those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = Mix()

    def forward(self, x: Tensor) -> Tensor:  # (B, positions of this process, WIDTH)
        """Returns the sequence after the layer."""
        return x + self.mix(self.norm(x))


class Mix(nn.Module):
    """Sees a word and the one before it, through hidden features of which each process has some."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.before = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.out = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, LENGTH, WIDTH)
        """Returns what is added to each word."""
        return self.out(F.gelu(self.now(x) + F.pad(self.before(x), (0, 0, 1, -1))))


class Model(nn.Module):
    """The language model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:  # (B, LENGTH) -> (B, LENGTH, WORDS)
        """Returns the scores of every next word."""
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def laid_out(model: Model, mesh: DeviceMesh) -> Model:
    """Returns the model, each layer computed by all processes of the mesh. Between layers each has some positions."""
    for block in model.blocks:
        plan = {
            "norm": SequenceParallel(),
            "mix": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            "mix.now": ColwiseParallel(),
            "mix.before": ColwiseParallel(),
            "mix.out": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(block, mesh, plan)
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def sentences(count: int, *, seed: int) -> Tensor:  # (count, LENGTH + 1)
    """Returns sentences in which each word is followed by one of two, the same in every process."""
    drawn = torch.Generator().manual_seed(seed)
    follows = torch.randint(WORDS, (WORDS, 2), generator=torch.Generator().manual_seed(0))
    words = [torch.randint(WORDS, (count,), generator=drawn)]
    for _ in range(LENGTH):
        words.append(follows[words[-1], torch.randint(2, (count,), generator=drawn)])
    return torch.stack(words, 1)


def loss_per_example(model: nn.Module, batch: tuple[Tensor]) -> Tensor:  # (B,)
    """Returns each sentence's own mean loss."""
    (ids,) = batch
    scores = model(ids[:, :-1]).transpose(1, 2)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none").mean(1)


def main() -> None:
    """Trains, and prints what came of it on the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget at delta = 1e-4")
    parser.add_argument("--data-parallel", type=int, default=1, help="how many groups of processes there are")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    console = Console(quiet=not first)
    groups = options.data_parallel
    mesh = init_device_mesh("cpu", (groups, dist.get_world_size() // groups), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(1)
    model = laid_out(Model(), mesh["tp"])
    if groups > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])

    mechanism = Mechanism(sampling=Poisson(RATE), clipping=Flat(CLIP_NORM), noise=Gaussian(1.0), steps=STEPS)
    step = PrivateStep(
        model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        mechanism=mechanism.calibrated(epsilon=options.epsilon, delta=DELTA),
        loss_per_example=loss_per_example,
    )
    held_out = (sentences(512, seed=3),)

    def measured() -> float:
        with torch.no_grad():
            return loss_per_example(model, held_out).mean().item()

    before = measured()
    loader = step.batches(TensorDataset(sentences(EXAMPLES, seed=2)))
    for batch in track(loader, description="steps", total=STEPS, console=console, disable=not first):
        step(batch)
    console.print(repr(step).splitlines()[4].strip(), highlight=False)
    console.print(
        f"loss on held-out sentences {before:.3f} before and {measured():.3f} after, at ε = {step.epsilon(DELTA):.2f}, "
        f"δ = {DELTA}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
