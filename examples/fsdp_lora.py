"""Fine-tunes a small Llama-like language model with low-rank adapters (LoRA) under a privacy budget, fully sharded.

    torchrun --nproc-per-node 2 examples/fsdp_lora.py

Every process holds a part of each parameter, and gathers a block only while it computes. The lines that privet needs
are those of any other run, in this order: the process group, fully_shard on each block and then on the model, the
optimizer, make_private. It works the same for a model of any size.

The model is written out in plain torch: RMS norms, attention with rotary positions, a gated feed-forward. It is trained
here, without privacy, on public text (sentences from one grammar), and then adapted with privacy to sentences of
another one, which are taken to be people's own. Only the adapters train, and so only they get noise.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine

DELTA = 1e-4
WORDS, LENGTH, WIDTH, HEADS, BLOCKS, RANK = 64, 16, 64, 4, 2, 8
EXAMPLES, BATCH_SIZE, CLIP_NORM = 4096, 512, 0.5


class Adapted(nn.Module):
    """A frozen linear layer with a trainable product of two thin matrices beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.down = nn.Linear(inputs, RANK, bias=False)
        self.up = nn.Linear(RANK, outputs, bias=False)
        nn.init.zeros_(self.up.weight)  # the adapter begins as nothing

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of both."""
        return self.base(x) + self.up(self.down(x))


def turned(x: Tensor) -> Tensor:  # (B, heads, T, d)
    """Returns queries or keys with each pair of features turned by an angle that grows with the position."""
    half = x.shape[-1] // 2
    speeds = 1000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device).unsqueeze(1) * speeds
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()), -1)


class Block(nn.Module):
    """One layer of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_gate = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.key = Adapted(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value, self.out = Adapted(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = Adapted(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        """Returns the sequence after attention and the gated feed-forward."""
        h = self.before_attention(x)
        query, key, value = (
            part(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(turned(query), turned(key), value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        h = self.before_gate(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The language model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, WORDS)
        """Returns the scores of every next word."""
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sentences(count: int, *, grammar: int, seed: int) -> Tensor:  # (count, LENGTH + 1)
    """Returns sentences in which each word is followed by one of two, which a grammar is about."""
    drawn = torch.Generator().manual_seed(seed)
    follows = torch.randint(WORDS, (WORDS, 2), generator=torch.Generator().manual_seed(grammar))
    words = [torch.randint(WORDS, (count,), generator=drawn)]
    for _ in range(LENGTH):
        words.append(follows[words[-1], torch.randint(2, (count,), generator=drawn)])
    return torch.stack(words, 1)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:  # ()
    """Returns the mean over sentences of each sentence's own mean loss."""
    scores = model(ids[:, :-1]).transpose(1, 2)
    return F.cross_entropy(scores, ids[:, 1:], reduction="none").mean(1).mean()


def public_model(device: torch.device) -> Llama:
    """Returns the model after some training on public text, the same in every process, with all but adapters frozen."""
    torch.manual_seed(0)
    model = Llama().to(device)
    text = sentences(2048, grammar=1, seed=1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in range(0, 40 * 128, 128):
        at = start % len(text)
        optimizer.zero_grad()
        loss_of(model, text[at : at + 128]).backward()
        optimizer.step()
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Adapted):
            module.down.requires_grad_(True)
            module.up.requires_grad_(True)
    return model


def main() -> None:
    """Trains, and prints what came of it on the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget at delta = 1e-4")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    first = dist.get_rank() == 0
    console = Console(quiet=not first)

    model = public_model(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    private = sentences(EXAMPLES, grammar=2, seed=2)
    held_out = sentences(512, grammar=2, seed=3).to(device)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(private), batch_size=BATCH_SIZE),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=options.epochs,
        max_grad_norm=CLIP_NORM,
    )

    def measured() -> float:
        model.eval()
        with torch.no_grad():
            found = loss_of(model, held_out).item()
        model.train()
        return found

    before = measured()
    for _ in track(range(options.epochs), description="epochs", console=console, disable=not first):
        for (ids,) in loader:
            optimizer.zero_grad()
            loss_of(model, ids.to(device)).backward()
            optimizer.step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"{dist.get_world_size()} processes, {trained} trained parameters; loss on held-out sentences "
        f"{before:.3f} before and {measured():.3f} after, at ε = {engine.get_epsilon(DELTA):.2f}, δ = {DELTA}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
