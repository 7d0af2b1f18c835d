"""Rows of the table for parameters that meet data in other operations than layers do: masks, copies, writes, einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rows = list[tuple[str, Callable[[], nn.Module], Any]]
T, D, H = 4, 6, 2


class With(nn.Module):
    """A function of data and one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.value = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.value)


def attended(x: Tensor, mask: Tensor) -> Tensor:
    heads = x.unflatten(2, (H, D // H)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads.sin(), heads.cos(), attn_mask=mask)


def windowed(x: Tensor, mask: Tensor) -> Tensor:
    """Two windows for each example, merged with the batch, as Swin's."""
    windows = x.unflatten(1, (2, T // 2)).flatten(0, 1)
    heads = windows.unflatten(2, (H, D // H)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads.sin(), heads, attn_mask=mask).unflatten(0, (-1, 2))


def dropped(x: Tensor, mask: Tensor) -> Tensor:
    """Dropout that drops nothing: the form of the call, and the same numbers."""
    heads = x.unsqueeze(1)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask.unsqueeze(0), dropout_p=1e-30)


def masked(x: Tensor, value: Tensor) -> Tensor:
    hidden = x * 1.0
    hidden[~(x[..., 0] <= 0.0)] = value
    return hidden * x


def class_token(x: Tensor, value: Tensor) -> Tensor:
    hidden = x * 1.0
    hidden[:, 0] = value
    return hidden * x.sin()


def over_heads(x: Tensor, keys: Tensor) -> Tensor:
    """A table of each head, repeated for each example, as DeBERTa's positions."""
    rows = len(x)
    queries = x.unflatten(2, (H, D // H)).transpose(1, 2).flatten(0, 1)  # (B H, T, D / H)
    return torch.bmm(queries, keys.repeat(rows, 1, 1).transpose(1, 2)).view(rows, H, T, -1)


def viewed(x: Tensor, value: Tensor) -> Tensor:
    return x * value.repeat(len(x), 1, 1).view(len(x) * T, D).view(len(x), T, D)


def gates(x: Tensor, matrices: Tensor) -> Tensor:
    """A matrix for each head, of data with batch and positions merged behind the heads, as RecurrentGemma's gates."""
    rows = x.unflatten(2, (H, D // H)).flatten(0, 1).permute(1, 0, 2)
    bias = matrices[:, 0]
    found = torch.baddbmm(bias[:, None, :], rows, matrices[:, 1:])
    return found.transpose(0, 1).reshape(x.shape[0], T, H * 3)


def merged_and_mapped(x: Tensor, entries: Tensor) -> Tensor:
    """An operation without a rule, of data with batch and positions merged on axis 1."""
    rows = x.unflatten(2, (H, D // H)).flatten(0, 1).permute(1, 0, 2)
    return torch.cdist(rows, entries, p=3.0).transpose(0, 1).reshape(x.shape[0], T, H * 2)


def by_head(x: Tensor, matrices: Tensor) -> Tensor:
    return torch.matmul(x.unflatten(2, (H, D // H)).transpose(1, 2), matrices)


def transitions(x: Tensor, table: Tensor) -> Tensor:
    """Scores of pairs of neighbors, as a CRF's, some counted from the end."""
    tags = (x[..., 0] > 0).long() + (x[..., 1] > 0.5).long() - 1
    return table[tags[:, :-1], tags[:, 1:]] * x[:, 1:, 0]


def columns(x: Tensor, table: Tensor) -> Tensor:
    tags = (x[..., 0] > 0).long() + (x[..., 1] > 0.5).long()
    return table[:, tags].movedim(0, -1) * x[..., :1] + table[tags, 1:].sum(-1, keepdim=True)


def cell_of(x: Tensor, table: Tensor) -> Tensor:
    """One place by the data, one that is the same for all."""
    tags = (x[..., 0] > 0).long()
    return table[tags, torch.arange(T) % 2] * x


class Loop(nn.Module):
    """A cell over the positions, from a state of zeros."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for position in x.unbind(1):
            state = self.cell(position, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


def mixed() -> Rows:
    """Returns the name, the module and the inputs of each case."""
    x = lambda size, dtype: (torch.randn(size, T, D, dtype=dtype),)  # noqa: E731
    functions: list[tuple[str, Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = [
        ("mask of attention", attended, (H, T, T)),
        ("mask of attention, one for all heads", attended, (1, 1, T, T)),
        ("mask of attention, windows merged", windowed, (1, H, T // 2, T // 2)),
        ("mask of attention with dropout", dropped, (T, T)),
        ("written at a mask", masked, (D,)),
        ("written at a place", class_token, (D,)),
        ("repeated for each example over heads", over_heads, (H, 3, D // H)),
        ("repeated, then viewed", viewed, (1, T, D)),
        ("matrix times data", lambda x, w: w @ x, (3, T)),
        ("matrix times data, mean taken", lambda x, w: torch.matmul(w, x.mT).sin().mean(2), (3, D)),
        ("einsum, linear", lambda x, w: torch.einsum("btd,de->bte", x, w), (D, 3)),
        ("einsum, heads", lambda x, w: torch.einsum("btd,dhe->bhte", x, w), (D, H, 3)),
        ("einsum, over positions", lambda x, w: torch.einsum("ts,bsd->bdt", w, x), (3, T)),
        ("einsum, all contracted", lambda x, w: torch.einsum("btd,td->b", x, w).unsqueeze(1), (T, D)),
        ("einsum, no arrow", lambda x, w: torch.einsum("btd,de", x, w), (D, 3)),
        ("einsum, one entry for all", lambda x, w: torch.einsum("btd,td->bt", x, w), (1, D)),
        ("einsum, contracted with one entry", lambda x, w: torch.einsum("btd,de->bte", x, w), (1, 3)),
        ("einsum, letter shared by all", lambda x, w: torch.einsum("btd,tde->bte", x, w), (T, D, 3)),
        ("batched product with something added", gates, (H, 1 + D // H, 3)),
        ("batched product by head", by_head, (H, D // H, 5)),
        ("batched product by head, one for all", by_head, (1, 1, D // H, 5)),
        ("batched product from the left", lambda x, w: w @ x.unflatten(2, (H, D // H)).permute(0, 2, 3, 1), (H, 2, 3)),
        ("batched product, used twice", lambda x, w: by_head(x, w) + by_head(x.sin(), w), (H, D // H, 3)),
        ("product with a vector", lambda x, w: x @ w, (D,)),
        ("product with a vector, mean taken", lambda x, w: torch.mv(x.mean(1), w).unsqueeze(1), (D,)),
        ("addmv", lambda x, w: torch.addmv(w[:1], x.sum(1), w, beta=0.5, alpha=2.0).unsqueeze(1), (D,)),
        ("merged on axis 1, mapped", merged_and_mapped, (2, D // H)),
        ("distance", torch.cdist, (5, D)),
        (
            "distance, twice, once from the left",
            lambda x, w: torch.cdist(w.unsqueeze(0), x, p=2).mT - torch.cdist(x.cos(), w),
            (5, D),
        ),
        ("distance, of powers", lambda x, w: torch.cdist(x, w, p=3.0), (5, D)),
        ("pairs of places", transitions, (3, 3)),
        ("places along the second axis", columns, (3, 3)),
        ("one place by data, one fixed", cell_of, (2, 2, D)),
        ("one more than the parameter", lambda x, w: x * (1.0 + w), (D,)),
        ("places that repeat", lambda x, w: x + w[torch.arange(T)[:, None] // 2 + torch.arange(D) // 3], (3,)),
    ]
    cells: Rows = [
        ("loop over an LSTM cell", lambda: Loop(nn.LSTMCell(D, 3)), x),
        ("loop over a GRU cell", lambda: Loop(nn.GRUCell(D, 3)), x),
        ("loop over a plain cell", lambda: Loop(nn.RNNCell(D, 3)), x),
        ("loop over a plain cell, relu, no bias", lambda: Loop(nn.RNNCell(D, 3, bias=False, nonlinearity="relu")), x),
    ]
    return cells + [(name, lambda f=f, shape=shape: With(f, *shape), x) for name, f, shape in functions]  # type: ignore[misc]
