"""Models that use their parameters in every way that has been seen to break a library of this field.

Each is a class; `Case` says what a batch of n examples looks like and what the loss of each example is. T, the number
of positions, is 4 throughout, so that batches of 4 are ambiguous to whoever guesses from shapes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

T, D, V = 4, 3, 7


def squares(output: Tensor) -> Tensor:  # (B, ...) -> (B,)
    return output.flatten(1).square().sum(1)


def vectors(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(n, D, generator=g, dtype=torch.float64),)


def sequences(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(n, T, D, generator=g, dtype=torch.float64),)


def images(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(n, 2, 5, 5, generator=g, dtype=torch.float64),)


def tokens(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(V, (n, T), generator=g),)


def two(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
    return (*vectors(n, g), torch.randn(n, 2, generator=g, dtype=torch.float64))


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    loss: Callable[[nn.Module, Any], Tensor] = lambda m, b: squares(m(*b))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.table(ids)), self.table.weight)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


class Functional(nn.Module):
    """The weight as a matrix in products written by hand, transposed and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 2 * D))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2, dim=1)
        return torch.tanh(x @ first) @ second.t() + x @ self.weight[:, :D]


class Elementwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(1))
        self.total = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift) * self.total.sum()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Orthogonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.orthogonal(nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Pruned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        mask = (torch.arange(D * D).view(D, D) % 2).double()
        prune.custom_from_mask(self.layer, "weight", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ClassToken(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.layer = nn.Linear(D, D)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.how == "expand"
        token = self.token.expand(len(x), -1, -1) if expanded else self.token.repeat(len(x), 1, 1)
        return self.layer(torch.cat([token, x], dim=1)).square()


class Positions(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        shape = {"arange": (T, D), "slice": (2 * T, D), "batched": (1, T, D), "sequence first": (T, 1, D)}[how]
        self.positions = nn.Parameter(torch.randn(shape))
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "arange":
            x = x + F.embedding(torch.arange(x.shape[1]), self.positions)
        elif self.how == "slice":
            x = x + self.positions[: x.shape[1]]
        elif self.how == "batched":
            x = x + self.positions
        else:
            return self.layer(x.transpose(0, 1) + self.positions).transpose(0, 1).sin()
        return self.layer(x).sin()


class PositionIds(nn.Module):
    """Position ids kept in a buffer of shape (1, T), as large language models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(V, D), nn.Embedding(2 * T, D)
        self.register_buffer("ids", torch.arange(2 * T).unsqueeze(0))
        self.norm = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.words(ids) + self.places(self.ids[:, : ids.shape[1]])).sin()


class Merged(nn.Module):
    """Batch and positions in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(D, D), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.tanh(self.layer(x.reshape(-1, D)) * self.scale)
        return flat.view(*x.shape[:2], D)


class MatrixByAddmm(nn.Module):
    """A linear layer with its weight transposed, applied by `addmm` to merged axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], D).sin()


class SequenceFirst(nn.Module):
    """Positions outside, batch inside, as in a recurrent layer of torch's default layout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.second = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.layer(x.transpose(0, 1)))).transpose(0, 1)


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Bilinear(D, 2, D)
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor, *, other: Tensor, flip: bool = False, name: str = "") -> Tensor:
        mixed = self.mixer(x, other)
        return self.layer(-mixed if flip else mixed)


class HiddenTerm(nn.Module):
    """A further term of the loss, left as an attribute by the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(1)
        self.penalty = gates.square().sum(1)
        return self.layer(x) * gates[:, :1]


@dataclasses.dataclass
class Answer:
    logits: Tensor
    name: str = "answer"


class Answers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        logits = self.layer(x)
        return Answer(logits) if self.kind == "dataclass" else {"logits": logits, "nested": [logits.detach()]}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)
        self.act = nn.ReLU(inplace=True)
        self.layer = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.norm(self.act(self.convolution(x))))
        return F.elu(self.layer(hidden.flatten(1)), inplace=True)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.Linear(D, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=self.reentrant)
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))


class Unused(nn.Module):
    """A parameter that no forward uses, and one whose use depends on nothing that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 1, batch_first=True)
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.layer(x + attended)


ZOO: dict[str, Case] = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)), vectors),
    "linear of sequences": Case(lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2)), sequences),
    "convolution": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), nn.Tanh(), nn.Conv2d(3, 3, 2, groups=3)
        ),
        images,
    ),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(V, D, padding_idx=1), nn.LayerNorm(D, bias=False)), tokens),
    "tied weights": Case(Tied, vectors),
    "embedding tied to the output": Case(TiedEmbedding, tokens),
    "weight used three times": Case(Reused, vectors),
    "weight used functionally": Case(Functional, sequences),
    "elementwise": Case(Elementwise, sequences),
    "weight norm": Case(Normed, vectors),
    "orthogonal parametrization": Case(Orthogonal, vectors),
    "pruned": Case(Pruned, vectors),
    "class token expanded": Case(lambda: ClassToken("expand"), sequences),
    "class token repeated": Case(lambda: ClassToken("repeat"), sequences),
    "positions by arange": Case(lambda: Positions("arange"), sequences),
    "positions by slice": Case(lambda: Positions("slice"), sequences),
    "positions (1, T, D)": Case(lambda: Positions("batched"), sequences),
    "positions (T, 1, D)": Case(lambda: Positions("sequence first"), sequences),
    "position ids (1, T)": Case(PositionIds, tokens),
    "merged axes": Case(Merged, sequences),
    "addmm": Case(MatrixByAddmm, sequences),
    "sequence first inside": Case(SequenceFirst, sequences),
    "several inputs": Case(SeveralInputs, two, lambda m, b: squares(m(b[0], other=b[1], flip=True, name="a"))),
    "hidden term": Case(HiddenTerm, vectors, lambda m, b: squares(m(b[0])) + m.penalty),
    "dataclass output": Case(lambda: Answers("dataclass"), vectors, lambda m, b: squares(m(b[0]).logits)),
    "dict output": Case(lambda: Answers("dict"), vectors, lambda m, b: squares(m(b[0])["logits"])),
    "in place": Case(InPlace, images),
    "checkpointed, reentrant": Case(lambda: Checkpointed(reentrant=True), vectors),
    "checkpointed, not reentrant": Case(lambda: Checkpointed(reentrant=False), vectors),
    "unused parameter": Case(Unused, vectors),
    "attention": Case(Attentive, sequences),
    "loss of shape (B, T)": Case(
        lambda: nn.Linear(D, D), sequences, lambda m, b: F.mse_loss(m(*b), b[0], reduction="none").mean(2).sum(1)
    ),
}


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name].make().to(dtype)


def plain(model: nn.Module) -> nn.Module:
    """Returns the model as plain autograd can run it: `autograd.grad` knows no reentrant checkpoints."""
    if isinstance(model, Checkpointed):
        model = copy.deepcopy(model)
        model.reentrant = False
    return model


def batch_of(name: str, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    batch = ZOO[name].batch(n, torch.Generator().manual_seed(seed))
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
