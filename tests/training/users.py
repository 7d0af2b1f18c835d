"""A data set of users with several records, models for it, its doors, and the sum by one user at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    Users,
)
from tests.contracts.doors import expected_sum, taken

RECORDS, T, D = 24, 4, 4  # positions and features coincide
IDS = torch.tensor([5, 2, 2, 9, 5, 5, 5, 7, 9, 2, 5, 1, 1, 1, 3, 5, 9, 9, 9, 2, 7, 1, 5, 5])  # users of 1 to 8 records
USERS, MOST, RATE = 6, 4, 0.6
RANDOM = torch.Generator().manual_seed(4)
X = torch.randn(RECORDS, T, D, generator=RANDOM, dtype=torch.float64)
Y = torch.randint(3, (RECORDS,), generator=RANDOM)


class Tied(nn.Module):
    """A table that is also the last layer, and a vector that is added to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, D))
        self.place = nn.Parameter(torch.randn(T, D))

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0] > 0).long() + (x[..., 1] > 0).long()
        return F.linear(torch.tanh(F.embedding(ids, self.table) + self.place).mean(1), self.table)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "positions": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Flatten(), nn.Linear(T * D, 3, bias=False)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(T, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * D, 3)
    ),
    "tied": Tied,
    "recurrent": lambda: nn.Sequential(nn.LayerNorm(D), Last(nn.GRU(D, 3, batch_first=True))),
}


class Last(nn.Module):
    """A recurrent layer's last position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def data_of(x: Tensor = X) -> TensorDataset:
    return TensorDataset(torch.arange(RECORDS), x, Y)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[1]), batch[2], reduction="none")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def explicit(model: nn.Module, users: Users, data: Any = None, **options: Any) -> Iterator[tuple[Tensor, dict]]:
    """Yields the records of each batch, and the sum that the optimizer was handed, at the explicit door."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(RATE), clipping=Flat(0.5), noise=Gaussian(0.0), steps=4),
        loss_per_example=loss,
        performance=Performance(**options),
        unit="user",
        noise_generator=seeded(),
    )
    seen = taken(model, optimizer)
    for batch in step.batches(data_of() if data is None else data, users=users):
        step(batch)
        yield batch[0], {n: g * RATE * USERS for n, g in seen[-1].items()}


def paper(
    model: nn.Module, users: Users, data: Any = None, *, most: int | None = None, accumulate: int = 1
) -> Iterator[tuple[Tensor, dict]]:
    """Yields the same at the paper's door; `most` for virtual steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = PrivacyEngine(unit="user")
    _, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data_of() if data is None else data, batch_size=4 // accumulate),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        accumulate=accumulate,
        noise_generator=seeded(),
        users=users,
    )
    seen = taken(model, optimizer)
    records: list[Tensor] = []

    def run(batches: Any, steps: Callable[[], bool]) -> Iterator[tuple[Tensor, dict]]:
        for index, x, y in batches:
            records.append(index)
            losses = F.cross_entropy(model(x), y, reduction="none")
            (losses.sum() / max(len(x), 1) / accumulate).backward()
            if steps():
                optimizer.step()
                optimizer.zero_grad()
                yield torch.cat(records), {n: g * 4 for n, g in seen[-1].items()}
                records.clear()
            elif accumulate == 1:
                optimizer.step()

    for _ in range(2):  # passes of two steps
        if most is not None:
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=most, optimizer=optimizer) as parts:
                yield from run(parts, lambda: parts.last)
        else:
            yield from run(loader, lambda: len(records) == accumulate)


def reference(model: nn.Module, records: Tensor, gradient: str, x: Tensor = X, norm: float = 0.5) -> Any:
    """Returns the clipped sum, one user at a time."""
    names = [n for n, _ in model.named_parameters()]
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    for user in IDS[records].unique():
        own = records[IDS[records] == user]
        losses = F.cross_entropy(model(x[own]), Y[own], reduction=gradient)
        found = torch.autograd.grad(losses, list(model.parameters()))
        for n, g in zip(names, found, strict=True):
            rows[n].append(g)
    return expected_sum({n: torch.stack(r) for n, r in rows.items()}, Flat(norm))
