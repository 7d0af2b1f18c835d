"""Honest models, made at random of torch's own layers, whose examples stay apart: no check may refuse one."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["T", "batch_of", "model_of"]

D, T, WORDS = 8, 6, 11
"""Features, positions, and how many tokens there are. All blocks take (B, T, D), and return the same."""


class Swapped(nn.Module):
    """A part for channels first."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.part = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.part = kind(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)[0]


class Attention(nn.Module):
    """With separate biases of keys, whose gradient is zero but for rounding."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(*heads, is_causal=self.causal).transpose(1, 2).flatten(2))


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, x, x, need_weights=False)[0]


class AttentionPooling(nn.Module):
    """The bias of the score has a gradient of zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.softmax(self.score(x), 1) * x).sum(1, keepdim=True)


class Gate(nn.Module):
    """A branch behind a gate that is zero at the start."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.gate = part, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.part(x)


class Residual(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.norm, self.part = nn.LayerNorm(D), part

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(self.norm(x))


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(T, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(T, device=x.device))


class Hidden(nn.Module):
    """A gated unit, as in large language models."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


BLOCKS: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU()),
    lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(0.2)),
    lambda: nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.PReLU()),
    lambda: nn.LayerNorm(D),
    lambda: nn.RMSNorm(D),
    lambda: Swapped(nn.Conv1d(D, D, 3, padding=1), nn.InstanceNorm1d(D, affine=True), nn.ReLU()),
    lambda: Swapped(nn.Conv1d(D, D, 3, padding=1), nn.GroupNorm(2, D), nn.ReLU()),
    lambda: Swapped(nn.Conv1d(D, D, 3, padding=1), nn.ReLU(), nn.MaxPool1d(3, 1, 1)),
    lambda: Swapped(nn.Conv1d(D, D, 3, padding=1, groups=2), nn.AvgPool1d(3, 1, 1)),
    lambda: Swapped(nn.ConvTranspose1d(D, D, 3, padding=1)),
    lambda: Swapped(nn.LayerNorm(T)),
    lambda: Recurrent(nn.LSTM),
    lambda: Recurrent(nn.GRU),
    lambda: Attention(causal=False),
    lambda: Attention(causal=True),
    Torchs,
    AttentionPooling,
    Positions,
    Hidden,
    lambda: nn.TransformerEncoderLayer(D, 2, dim_feedforward=16, dropout=0.1, batch_first=True),
    lambda: nn.TransformerEncoderLayer(D, 2, dim_feedforward=16, activation="gelu", norm_first=True, batch_first=True),
]


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module], *, tokens: bool, pool: str) -> None:
        super().__init__()
        self.first = nn.Embedding(WORDS, D) if tokens else nn.Linear(D, D)
        self.blocks, self.last, self.pool = nn.Sequential(*blocks), nn.Linear(D, 3), pool

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.first(x))
        if self.pool == "max":
            return self.last(h.amax(1))
        return self.last(h.mean(1) if self.pool == "mean" else h[:, -1])


def model_of(architecture: int) -> Model:
    """Returns the model of that number; its weights are torch's."""
    draws = random.Random(architecture)
    blocks = []
    for _ in range(draws.randint(1, 4)):
        block = draws.choice(BLOCKS)()
        around = draws.choice([None, None, Residual, Gate])
        blocks.append(around(block) if around is not None else block)
    return Model(blocks, tokens=draws.random() < 0.4, pool=draws.choice(["mean", "max", "last"]))


def batch_of(model: Model, examples: int) -> Tensor:
    tokens = isinstance(model.first, nn.Embedding)
    return torch.randint(WORDS, (examples, T)) if tokens else torch.randn(examples, T, D)
