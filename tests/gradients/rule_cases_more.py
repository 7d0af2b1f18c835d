"""Rows of the table for bags of entries, bilinear forms, activations that learn, and tables tied to projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rows = list[tuple[str, Callable[[], nn.Module], Any]]
V, D = 7, 5


class Bag(nn.Module):
    """A bag whose ids come as a matrix, with weights where there are some."""

    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode=mode, **options)

    def forward(self, ids: Tensor, *weights: Tensor) -> Tensor:
        return self.bag(ids, per_sample_weights=weights[0] if weights else None)


class Offsets(nn.Module):
    """Bags of uneven length, some of them empty, in one row with offsets: ids of 0 end no bag but are left out."""

    def __init__(self, mode: str, *, last: bool = False, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(V, D, mode=mode, include_last_offset=last, **options)
        self.weighted = weighted

    def forward(self, ids: Tensor, *weights: Tensor) -> Tensor:
        kept = ids % 3 != 0
        offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
        offsets = offsets if self.bag.include_last_offset else offsets[:-1]
        return self.bag(ids[kept], offsets, weights[0][kept] if self.weighted else None)


class ManyBags(nn.Module):
    """Several bags for each example, batch and bags on one axis; used twice if `twice`."""

    def __init__(self, mode: str, *, twice: bool = False) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, D))
        self.mode, self.twice = mode, twice

    def forward(self, ids: Tensor) -> Tensor:
        found = self.bags_of(ids)
        return found * self.bags_of(ids.flip(2) % 3) if self.twice else found

    def bags_of(self, ids: Tensor) -> Tensor:
        return F.embedding_bag(ids.flatten(0, 1), self.table, mode=self.mode).unflatten(0, ids.shape[:2])


class Across(nn.Module):
    """A layer that sees the batch on axis 1."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*(x.transpose(0, 1) for x in inputs)).transpose(0, 1)


class BilinearTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x, x)), x)


def _ids(*shape: int) -> Any:
    return lambda size, dtype: (torch.randint(0, V, (size, *shape)),)


def _weighted(*shape: int) -> Any:
    return lambda size, dtype: (torch.randint(0, V, (size, *shape)), torch.randn(size, *shape, dtype=dtype))


def _reals(*shapes: tuple[int, ...]) -> Any:
    return lambda size, dtype: tuple(torch.randn(size, *shape, dtype=dtype) for shape in shapes)


def bags() -> Rows:
    rows: Rows = []
    for mode in ("sum", "mean", "max"):
        rows += [
            (f"{mode}, padding", lambda mode=mode: Bag(mode, padding_idx=1), _ids(3)),
            (f"{mode}, last offset, padding", lambda mode=mode: Offsets(mode, last=True, padding_idx=-3), _ids(6)),
            (f"{mode}, several bags, used twice", lambda mode=mode: ManyBags(mode, twice=True), _ids(3, 4)),
        ]
    rows += [
        ("sum, offsets", lambda: Offsets("sum"), _ids(6)),
        ("mean", lambda: Bag("mean"), _ids(6)),
        ("sum, weights, padding", lambda: Bag("sum", padding_idx=2), _weighted(6)),
        ("sum, weights, offsets", lambda: Offsets("sum", weighted=True), _weighted(6)),
    ]
    return rows


def forms() -> Rows:
    return [
        ("bilinear", lambda: nn.Bilinear(3, 4, 5), _reals((3,), (4,))),
        ("bilinear of sequences", lambda: nn.Bilinear(3, 4, 5), _reals((2, 3, 3), (2, 3, 4))),
        ("bilinear, batch on axis 1", lambda: Across(nn.Bilinear(3, 4, 2)), _reals((5, 3), (5, 4))),
        ("bilinear, used twice", BilinearTwice, _reals((3, 4))),
        ("PReLU", nn.PReLU, _reals((4, 5))),
        ("PReLU, a slope each", lambda: nn.PReLU(4), _reals((4, 5, 2))),
        ("PReLU of vectors", lambda: nn.PReLU(16), _reals((16,))),
        ("PReLU, batch on axis 1", lambda: Across(nn.PReLU()), _reals((4, 5))),
    ]
