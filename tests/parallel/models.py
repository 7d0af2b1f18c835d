"""Small models, data and runs that scenarios share. Everything public is the same in every process."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep

N = 60


class Net(nn.Module):
    def __init__(self, width=6, classes=3):
        super().__init__()
        self.inner = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.inner(x))))


def net(seed=0, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**sizes)


def data(n=N):
    drawn = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 5, generator=drawn), torch.randint(3, (n,), generator=drawn))


def per_example(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mechanism(*, rate=0.2, clip=0.7, sigma=1.0, steps=10):
    return Mechanism(sampling=Poisson(rate), clipping=Flat(clip), noise=Gaussian(sigma), steps=steps)


def step_on(model, *, what=None, seed=7, optimizer=None, **options):
    """Returns a PrivateStep with a reproducible key, so that every process draws the same batches and noise."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return PrivateStep(
        model,
        optimizer=optimizer or torch.optim.AdamW(model.parameters(), lr=0.05),
        mechanism=what or mechanism(),
        loss_per_example=per_example,
        noise_generator=generator,
        **options,
    )


def engine_on(
    model, *, seed=7, sigma=1.0, clip=0.7, batch_size=12, engine=None, optimizer=None, n=N, workers=0, **options
):
    """Returns an engine, and what its make_private returned."""
    engine = PrivacyEngine() if engine is None else engine
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    returned = engine.make_private(
        module=model,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.2),
        data_loader=DataLoader(data(n), batch_size=batch_size, num_workers=workers),
        noise_multiplier=sigma,
        max_grad_norm=clip,
        noise_generator=generator,
        **options,
    )
    return engine, *returned


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def digest(tensor):
    """Returns the bits of a tensor, to see whether two ranks hold the very same."""
    return tensor.detach().contiguous().reshape(-1).numpy().tobytes()
