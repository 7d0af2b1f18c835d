"""The networks that are timed, with synthetic data of the right shape.

The first three are those of Yousefpour et al. 2021 ("Opacus", section 4), known by their parameter counts.
Axes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "Network"]

VOCABULARY = 10_004


class Mean(nn.Module):
    """Averages over some axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """Returns the average."""
        return x.mean(self.axes)


def mnist() -> nn.Module:
    """Returns the paper's convolutional network for MNIST: 26,010 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def cifar() -> nn.Module:
    """Returns the paper's convolutional network for CIFAR-10: 605,226 parameters."""
    layers: list[nn.Module] = []
    plan = ((3, 32, False), (32, 32, True), (32, 64, False), (64, 64, True))
    for inputs, outputs, pool in (*plan, (64, 128, False), (128, 128, True), (128, 256, False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.AvgPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Conv2d(256, 10, 3, padding=1), Mean(2, 3))


def embedding(*, sparse: bool = False) -> nn.Module:
    """Returns the paper's embedding network: 160,098 parameters."""
    return nn.Sequential(nn.Embedding(VOCABULARY, 16, sparse=sparse), Mean(1), nn.Linear(16, 2))


class Block(nn.Module):
    """One pre-norm layer of the transformer, of plain layers that every library knows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        """Returns the next layer's input."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A classifier of token sequences."""

    def __init__(self, *, width: int = 256, layers: int = 4, heads: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T)
        """Returns the logits (B, 2)."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(positions))).mean(1))


class Residual(nn.Module):
    """ResNet's basic block, with group normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(32, outputs), nn.GroupNorm(32, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(32, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the next block's input."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet() -> nn.Module:
    """Returns ResNet-18 for 32x32 images, with group normalisation: 11,173,962 parameters."""
    blocks: list[nn.Module] = []
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
        inputs = outputs
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, Mean(2, 3), nn.Linear(512, 10))


Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """A network, and synthetic batches that fit it."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    parameters: int
    batches: tuple[int, ...] = (16, 64, 512)
    channels_last: bool = False
    """Whether there is a channels-last form, which may be the fastest one without privacy."""
    sparse: Callable[[], nn.Module] | None = None
    """The form with sparse gradients of the embedding, if that is the fastest one without privacy."""


def images(channels: int, size: int, classes: int) -> Callable[[int], Batch]:
    """Returns a maker of batches of random images and labels."""
    return lambda examples: (torch.randn(examples, channels, size, size), torch.randint(classes, (examples,)))


def texts(length: int) -> Callable[[int], Batch]:
    """Returns a maker of batches of random token sequences and labels."""
    return lambda examples: (torch.randint(VOCABULARY, (examples, length)), torch.randint(2, (examples,)))


NETWORKS = {
    "mnist": Network(build=mnist, batch=images(1, 28, 10), parameters=26_010, channels_last=True),
    "cifar": Network(build=cifar, batch=images(3, 32, 10), parameters=605_226, channels_last=True),
    "embedding": Network(build=embedding, batch=texts(256), parameters=160_098, sparse=lambda: embedding(sparse=True)),
    "transformer": Network(build=Transformer, batch=texts(128), parameters=5_753_858),
    "resnet": Network(build=resnet, batch=images(3, 32, 10), parameters=11_173_962, channels_last=True),
}
