"""Whose row is it? Shapes that coincide, orders that hide, layers that are met late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attacks.doors import moved, moved_explicitly, rows
from attacks.table import Outcome, attack

KIND = "whose rows"
B = 16


class Chosen(nn.Module):
    """A layer that sees only the rows that a mask chooses, put back afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(torch.zeros_like(x).masked_scatter(mask[..., None], self.layer(x[mask])).sum(1))


def _masks(whole: int) -> Tensor:
    """Returns a mask of B tokens, all of them of the first example."""
    mask = torch.zeros(whole, B, dtype=torch.bool)
    mask[0] = True
    return mask


@attack(KIND, "tokens without padding: equal lengths first, then as many tokens as examples, all of one")
def _() -> Outcome:
    first = (rows(B, B, 3), torch.ones(B, B, dtype=torch.bool))
    return moved(Chosen, (rows(B, B, 3, seed=1), _masks(B)), before=[first], replaced=True)


@attack(KIND, "the same at the explicit door")
def _() -> Outcome:
    first = (rows(B, B, 3), torch.ones(B, B, dtype=torch.bool))
    return moved_explicitly(Chosen, (rows(B, B, 3, seed=1), _masks(B)), before=[first], replaced=True)


class Late(nn.Module):
    """Sequence first inside, with a layer that the first forwards skip."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.out, self.on = nn.Linear(4, 4), layer, nn.Linear(4, 2), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).transpose(0, 1)  # (T, B, D)
        h = self.layer(h) if self.on else h
        return self.out(h.sum(0))


def _late(layer: Any) -> float:
    """Returns what moves if the layer is met where there are as many positions as examples."""
    last: list[Any] = []

    def make() -> nn.Module:
        last[:] = [Late(layer()), 0]
        return last[0]

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        last[1] += 1
        last[0].on = last[1] > 1
        return batch[1] * model(batch[0]).square().sum(1)

    counts = torch.ones(B)
    counts[0] = 1e4  # where positions are taken for examples, this one fills them all
    return moved(make, (rows(B, B, 4, seed=1), counts), before=[(rows(B, B, 4), counts)], loss=loss, replaced=True)


@attack(KIND, "a layer first met after the check, sequence first, as many positions as examples")
def _() -> Outcome:
    return _late(lambda: nn.Linear(4, 4))


@attack(KIND, "the same with a recurrent layer")
def _() -> Outcome:
    class Recurrent(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    return _late(lambda: Recurrent(4, 4))


@attack(KIND, "the same with a transformer's layer")
def _() -> Outcome:
    return _late(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0))


class Sorted(nn.Module):
    """Rows sorted by a feature before a layer, and put back after it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True)
        return self.out(self.layer(x[order])[order.argsort()])


def _of_lengths(*lengths: int) -> Tensor:
    x = rows(len(lengths), 3)
    x[:, 0] = torch.tensor(lengths, dtype=torch.float)
    return x


@attack(KIND, "eight rows sorted inside, into the converse order")
def _() -> Outcome:
    return moved(Sorted, (_of_lengths(*range(8)),))


for _lengths in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
    attack(KIND, f"three rows sorted inside, of lengths {_lengths}")(
        lambda lengths=_lengths: moved(Sorted, (_of_lengths(*lengths),))
    )


@attack(KIND, "rows sorted inside, of equal lengths in the first batch")
def _() -> Outcome:
    return moved(Sorted, (_of_lengths(*range(8)),), before=[(_of_lengths(*[1] * 8),)])


class TimeFirst(nn.Module):
    """Positions outside and examples inside, merged into one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        h = self.layer(x.transpose(0, 1).reshape(-1, 3))
        return self.out(h.view(length, -1, 3).sum(0))


@attack(KIND, "axes merged with the batch inside")
def _() -> Outcome:
    return moved(TimeFirst, (rows(B, 4, 3),))


class BatchForTime(nn.Module):
    """batch_first was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


@attack(KIND, "batch_first forgotten in a trainable LSTM")
def _() -> Outcome:
    return moved(BatchForTime, (rows(B, 4, 3),))


class Experts(nn.Module):
    """A router hands rows to experts, without a word of whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.out = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, chosen = torch.zeros_like(x), (x[:, 0] > 0).long()
        for index, expert in enumerate(self.experts):
            (at,) = (chosen == index).nonzero(as_tuple=True)
            h = h.index_add(0, at, expert(x[at]))
        return self.out(h)


@attack(KIND, "rows handed to experts by a router")
def _() -> Outcome:
    return moved(Experts, (rows(B, 3),))


class Twice(nn.Module):
    """Two views of every example, put together inside of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(torch.cat([x, -2.0 * x])).chunk(2)
        return self.out(a * b)


@attack(KIND, "two views of each example, put together inside of the model")
def _() -> Outcome:
    return moved(Twice, (rows(B, 3),))
