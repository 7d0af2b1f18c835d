"""Models in several fully sharded groups, and what comes of one private step or of a run on them."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine, PrivateStep
from tests.parallel.models import N, mechanism

VOCABULARY, LENGTH = 11, 5


class Scale(nn.Module):
    """Unless it is simple, an operation without a rule, which needs the parameter's value after the backward."""

    def __init__(self, width, *, simple):
        super().__init__()
        self.simple = simple
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        if self.simple:
            return x * self.weight
        return x * (1.0 + F.cosine_similarity(x, self.weight, dim=-1)).unsqueeze(-1)


class Block(nn.Module):
    def __init__(self, width, *, simple):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.scale = Scale(2 * width, simple=simple)
        self.down = nn.Linear(2 * width, width)
        if not simple:  # a tensor made of parameters alone, whose way back needs their values
            parametrizations.weight_norm(self.down)
        self.again = False

    def inner(self, x):
        return x + self.down(self.scale(F.gelu(self.up(self.norm(x)))))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)


class Language(nn.Module):
    """A small language model: an embedding, which may be tied to the head, and blocks."""

    def __init__(self, *, width=6, tied=False, again=False, simple=False):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, simple=simple) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.table.weight
        for block in self.blocks:
            block.again = again

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def language(**options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Language(**options)


def sharded(model, **options):
    """Shards every block and then the rest, and returns the model."""
    # Said by torch of any model that ends in a linear layer on positions.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def texts(n=N):
    drawn = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randint(VOCABULARY, (n, LENGTH), generator=drawn))


def loss(model, batch):
    (ids,) = batch
    logits = model(ids[:, :-1]).float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def whole(tensor):
    """Returns all of a tensor of which this rank may hold a part."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().float().clone()


def step_on_texts(model, *, what=None, optimizer=None, seed=7, **options):
    return PrivateStep(
        model,
        optimizer=optimizer or torch.optim.AdamW(model.parameters(), lr=0.02),
        mechanism=what or mechanism(),
        loss_per_example=loss,
        noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )


def summed(model, *, rate=0.5, steps=1, what=None, **options):
    """Returns the clipped sums of some batches as the optimizer finds them: without noise, and divided."""
    found = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    what = mechanism(rate=rate, sigma=0.0, steps=steps, clip=0.3) if what is None else what
    step = step_on_texts(model, what=what, optimizer=optimizer, **options)
    optimizer.register_step_post_hook(
        lambda *_: found.append({n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad})
    )
    for batch in step.batches(texts()):
        step(batch)
    return found


def trained(model, **options):
    """Returns the weights after a run with noise, its ε, and how many examples each batch had here."""
    step = step_on_texts(model, **options)
    sizes = []
    for batch in step.batches(texts()):
        sizes.append(len(batch[0]))
        step(batch)
    return {n: whole(p) for n, p in model.named_parameters()}, step.epsilon(1e-5), sizes


def apart(found, wanted):
    """Returns the distance between two sets of tensors, and the size of the second."""
    assert set(found) == set(wanted)
    distance = torch.cat([(found[name] - wanted[name]).reshape(-1) for name in wanted]).norm()
    return float(distance), float(torch.cat([value.reshape(-1) for value in wanted.values()]).norm())


def engine_on_texts(model, *, seed=7, batch_size=12, sigma=1.0, clip=0.3, optimizer=None, **options):
    """Returns an engine, and what its make_private returned."""
    engine = PrivacyEngine()
    returned = engine.make_private(
        module=model,
        optimizer=optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02),
        data_loader=DataLoader(texts(), batch_size=batch_size),
        noise_multiplier=sigma,
        max_grad_norm=clip,
        noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )
    return engine, *returned


def loop(model, optimizer, loader, *, schedule=None):
    for (ids,) in loader:
        optimizer.zero_grad()
        loss(model, (ids,)).mean().backward()
        optimizer.step()
        if schedule:
            schedule.step()


def said(engine, model):
    """Returns the weights, ε, the steps on the ledger, and its remarks."""
    named = {n: whole(p) for n, p in model.named_parameters()}
    return named, engine.get_epsilon(1e-5), engine.ledger.steps, engine.ledger.marks
