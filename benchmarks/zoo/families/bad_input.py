"""What must be refused by its name at both doors, and the way on for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo.case import CLASSES, Batch, Case, Size, by_class, floats, labels


class Complex(nn.Module):
    """A map by complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, CLASSES, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


class Words(nn.Module):
    """An embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 4, sparse=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(x).mean(1))
        return found


class BySigns(torch.autograd.Function):
    """A linear map by the signs of a weight, which lets the weight's gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.sign().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.sign(), gradient.T @ x


class BinaryLinear(nn.Module):
    """A linear map by the signs of its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = BySigns.apply(x, self.weight)
        return found


class Pairs(nn.Module):
    """Two towers, whose outputs are compared over all pairs of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.tower(x), dim=-1)


def _two(n: int, s: Size) -> Batch:
    return torch.randn(n, 8), torch.randn(n, 8)


def _negatives(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(batch[0]) @ model(batch[1]).T
    return F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")


def _views(model: nn.Module, batch: Batch) -> Tensor:
    z = torch.stack([model(batch[0]), model(batch[1])], 1).flatten(0, 1)
    scores = z @ z.T / 0.1 - 1e9 * torch.eye(len(z), dtype=z.dtype)
    return F.cross_entropy(scores, torch.arange(len(z)) ^ 1, reduction="none").view(-1, 2).mean(1)


def _quantized() -> nn.Module:
    from torch.ao.nn import qat
    from torch.ao.quantization import get_default_qat_qconfig

    layer = nn.Linear(8, CLASSES)
    layer.qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return nn.Sequential(nn.Linear(8, 8), qat.Linear.from_float(layer))


def cases() -> list[Case]:
    """Returns the cases of this family."""
    flat = floats(8)
    return [
        Case("complex parameters", lambda s: Complex(), flat, by_class, refused="two real parameters"),
        Case(
            "sparse embedding",
            lambda s: Words(),
            lambda n, s: (torch.randint(20, (n, 4)), labels(n)),
            by_class,
            refused="sparse=False",
        ),
        Case("quantization-aware training", lambda s: _quantized(), flat, by_class, refused="calibrate", double=False),
        Case(
            "autograd Function of data and a parameter",
            lambda s: BinaryLinear(8, CLASSES),
            flat,
            by_class,
            refused="custom autograd Function",
            note="register_rule for the module, in full in [models](models.md)",
        ),
        Case("in-batch negatives", lambda s: Pairs(), _two, _negatives, refused="contrastive"),
        Case("SimCLR", lambda s: Pairs(), _two, _views, refused="contrastive"),
    ]
