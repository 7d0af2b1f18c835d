"""Norms that underflow, overflow or round: what one example can move where its numbers are extreme."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.doors import moved, rows
from attacks.table import Outcome, attack

KIND = "norms"


def _alone(make: Callable[[], nn.Module], x: Tensor, factor: float, clip: float) -> float:
    """Returns what an example of tiny inputs and a huge gradient moves, beside ordinary ones."""
    batch = (torch.cat([x, rows(3, *x.shape[1:])]), torch.tensor([factor, 1.0, 1.0, 1.0]))
    return moved(
        make, batch, clip=clip, replaced=False, before=[(rows(4, *x.shape[1:]), torch.ones(4))],
        loss=lambda m, b: (m(b[0]).flatten(1).sum(1) * b[1]),
    )  # fmt: skip


@attack(KIND, "a linear layer, inputs 2.6e-23, gradients 1.8e19")
def _() -> Outcome:
    return max(
        _alone(lambda d=d: nn.Linear(d, 1, bias=False), torch.full((1, d), 2.6e-23), 1.8e19, 1e-4)
        for d in (1, 100, 784)
    )


@attack(KIND, "the same over sequences")
def _() -> Outcome:
    return _alone(lambda: nn.Linear(64, 64, bias=False), torch.full((1, 8, 64), 2.6e-23), 1.8e19, 1e-4)


class Bare(nn.Module):
    """A bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


@attack(KIND, "the same by a bare parameter")
def _() -> Outcome:
    return _alone(Bare, torch.full((1, 64), 2.6e-23), 1.8e19, 1e-4)


class Recurrent(nn.Module):
    """A recurrent layer without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(16, 8, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1].transpose(0, 1)


@attack(KIND, "the same by a recurrent layer without bias")
def _() -> Outcome:
    return _alone(Recurrent, torch.full((1, 5, 16), 2.6e-23), 1.8e19, 1e-4)


@attack(KIND, "a mean of squares over 4096 rows, targets of 3e22, C = 1")
def _() -> Outcome:
    x, y = rows(4096, 64), torch.zeros(4096)
    x[0], y[0] = 2.6e-23, -3e22
    return moved(
        lambda: nn.Linear(64, 1, bias=False), (x, y), reduce=torch.mean, before=[(x[1:], y[1:])],
        loss=lambda m, b: (m(b[0])[:, 0] - b[1]).square(), batch_size=8,
    )  # fmt: skip


class Bag(nn.Module):
    """A bag of embeddings with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 64, mode="sum")

    def forward(self, weights: Tensor) -> Tensor:
        at = torch.arange(5).expand(len(weights), 5)
        return self.bag(at, per_sample_weights=weights)


@attack(KIND, "a bag of embeddings with weights of 2e-23")
def _() -> Outcome:
    return _alone(Bag, torch.full((1, 5), 2e-23), 1.8e19, 1e-4)


class Form(nn.Module):
    """A bilinear form of an input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(4, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


@attack(KIND, "a bilinear form, features 1e12, gradients 1e-23")
def _() -> Outcome:
    return _alone(Form, torch.full((1, 4), 1e12), 1e-23, 1.0)


@attack(KIND, "a bilinear form, features 1e19, gradients 1e-23")
def _() -> Outcome:
    return _alone(Form, torch.full((1, 4), 1e18), 1e-23, 1.0)


@attack(KIND, "a row that is infinite, NaN, or overflows")
def _() -> Outcome:
    return max(
        _alone(lambda: nn.Linear(5, 2), torch.full((1, 5), bad), 1.0, 1.0)
        for bad in (float("inf"), float("nan"), 3e38, -3e38)
    )


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 3), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 3, bias=False), (6,)),
    "linear over positions": (lambda: nn.Linear(6, 3, bias=False), (5, 6)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 5, 5)),
    "deep": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), (6,)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), (6,)),
}
for _name, (_make, _shape) in LAYERS.items():

    @attack(KIND, f"{_name}: inputs and gradients over 1e-38 to 1e38")
    def _(make: Callable[[], nn.Module] = _make, shape: tuple[int, ...] = _shape) -> Outcome:
        sizes = [1e-38, 1e-23, 1e-12, 1.0, 1e12, 1e19, 1e37]
        pairs = [(a, g) for a in sizes for g in sizes if 1e-38 <= a * g <= 1e38]
        return max(_alone(make, torch.full((1, *shape), a), g, 1e-3) for a, g in pairs[::3])


@attack("precision", "bfloat16: 4096 positions whose squares round away")
def _() -> Outcome:
    x = torch.cat([torch.ones(1, 4096, 8), rows(3, 4096, 8)]).bfloat16()
    return moved(
        lambda: nn.Linear(8, 2, bias=False).bfloat16(), (x,), loss=lambda m, b: m(*b).float().flatten(1).sum(1)
    )


@attack("precision", "float16 in autocast, backward inside")
def _() -> Outcome:
    def loss(m: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return 50.0 * m(*b).float().square().sum(1)

    return moved(lambda: nn.Linear(64, 8), (rows(8, 64),), loss=loss)


class Tied(nn.Module):
    """An embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.table(x), self.table.weight)


@attack(KIND, "an embedding tied to the output, repeated tokens")
def _() -> Outcome:
    tokens = torch.arange(32).view(8, 4) % 7
    tokens[0] = 1
    return moved(Tied, (tokens,))


class UsedTwice(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))) + x @ self.layer.weight


@attack(KIND, "a weight used three times")
def _() -> Outcome:
    return moved(UsedTwice, (rows(8, 4),))
