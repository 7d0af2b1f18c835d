"""Losses by their graphs: what lets one example rescale another is named, and honest losses pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet.gradients.capture.loss_graph import read_graph
from privet.gradients.capture.loss_rules import faults_of

B, CLASSES = 6, 5
Loss = Callable[[Tensor, Tensor, Tensor], Any]  # outputs (B, 5), labels (B,), targets (B, 5)


def none(o: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(o, y, reduction="none")


HONEST: dict[str, Loss] = {
    "cross entropy": lambda o, y, t: F.cross_entropy(o, y),
    "label smoothing": lambda o, y, t: F.cross_entropy(o, y, label_smoothing=0.1),
    "soft labels": lambda o, y, t: F.cross_entropy(o, t.softmax(1)),
    "weights that are not divided out": lambda o, y, t: F.cross_entropy(o, y, t[0].exp(), reduction="sum") / B,
    "squares": lambda o, y, t: F.mse_loss(o, t),
    "squares of one column": lambda o, y, t: F.mse_loss(o[:, 0], t[:, 0]),
    "squares of a column that stays one": lambda o, y, t: F.mse_loss(o[:, :1], t[:, :1]),
    "a root for each example": lambda o, y, t: (o - t).square().mean(1).sqrt().mean(),
    "a norm for each example": lambda o, y, t: (o - t).norm(dim=1).mean(),
    "fixed prototypes": lambda o, y, t: F.cross_entropy(o @ torch.ones(CLASSES, 7), y),
    "focal": lambda o, y, t: ((1 - (-none(o, y)).exp()) ** 2 * none(o, y)).mean(),
    "a loop over examples": lambda o, y, t: sum((o[i] - t[i]).square().mean().sqrt() for i in range(B)) / B,
    "a loop over slices": lambda o, y, t: sum(none(o[i : i + 1], y[i : i + 1]).sum() for i in range(B)) / B,
    "stacked": lambda o, y, t: torch.stack([((o[i] - t[i]) * o[i]).sum() for i in range(B)]).mean(),
    "divergence": lambda o, y, t: F.kl_div(o.log_softmax(1), t.softmax(1), reduction="batchmean"),
    "hinge": lambda o, y, t: F.multi_margin_loss(o, y),
    "tokens": lambda o, y, t: F.cross_entropy(o.unsqueeze(1).expand(B, 3, 5).reshape(-1, 5), y.repeat(3)),
    "tokens, classes second": lambda o, y, t: F.cross_entropy(o.unsqueeze(2).expand(B, 5, 3), y[:, None].expand(B, 3)),
    "time first": lambda o, y, t: F.cross_entropy(o.expand(3, B, 5).reshape(-1, 5), y.repeat(3)),
    "quantiles": lambda o, y, t: (o[:, :1] - torch.rand(3)).abs().mean(),
    "centred by example": lambda o, y, t: (o - o.mean(1, keepdim=True)).square().mean(),
    "scaled": lambda o, y, t: 1024.0 * F.cross_entropy(o, y),
    "two terms": lambda o, y, t: F.cross_entropy(o, y) + 0.1 * o.square().mean(),
    "cosine": lambda o, y, t: F.cosine_similarity(o, t).mean(),
    "triplets by row": lambda o, y, t: F.triplet_margin_loss(o, t, t + 1),
    "overlap by example": lambda o, y, t: (1 - 2 * (o.sigmoid() * t).sum(1) / (o.sigmoid().sum(1) + 1)).mean(),
    "masked": lambda o, y, t: ((o - t) ** 2 * (t > 0)).sum() / B,
    "a Gram matrix for each example": lambda o, y, t: torch.bmm(o[:, :, None], o[:, None]).square().mean(),
    "chosen by labels": lambda o, y, t: -(o.log_softmax(1)[range(B), y]).mean() + o[:, 0].exp().mean(),
    "views of one example": lambda o, y, t: torch.stack([o, o * t], 1).matmul(torch.stack([o, t], 2)).softmax(2).mean(),
    "views, then a head": lambda o, y, t: F.cross_entropy(torch.stack([o, o * t]).flatten(0, 1), y.repeat(2)),
    "cut and put together": lambda o, y, t: F.cross_entropy(torch.cat([o[:3], o[3:]]), y),
    "in another order": lambda o, y, t: F.mse_loss(o.flip(0), t.flip(0)),
}

DISHONEST: dict[str, tuple[Loss, str]] = {
    "weighted by class": (lambda o, y, t: F.cross_entropy(o, y, t[0].exp()), "weighted by class"),
    "labels left out": (lambda o, y, t: F.cross_entropy(o, y, ignore_index=0), "ignore_index"),
    "(B, 1) with (B,)": (lambda o, y, t: F.mse_loss(o[:, :1], t[:, 0]), "broadcasting"),
    "(B,) with (B, 1)": (lambda o, y, t: (o[:, 0] - t[:, :1]).abs().mean(), "broadcasting"),
    "a root of the mean": (lambda o, y, t: F.mse_loss(o, t).sqrt(), "not linear|added up"),
    "a norm of the batch": (lambda o, y, t: (o - t).norm(), "over the batch"),
    "contrastive": (lambda o, y, t: F.cross_entropy(o @ o.T, torch.arange(B)), "contrastive"),
    "contrastive by einsum": (lambda o, y, t: torch.einsum("bd,cd->bc", o, o).exp().mean(), "contrastive"),
    "two views of each, side by side": (lambda o, y, t: views(torch.stack([o, o * t], 1)), "contrastive"),
    "two views of each, stacked": (lambda o, y, t: views(torch.stack([o, o * t])), "contrastive"),
    "two views of each, joined": (lambda o, y, t: views(torch.cat([o, o * t])), "contrastive"),
    "covariance": (lambda o, y, t: (o.T @ o).square().mean(), "contrastive"),
    "all distances": (lambda o, y, t: torch.pdist(o).mean(), "contrastive"),
    "cdist": (lambda o, y, t: torch.cdist(o, o + 1).mean(), "contrastive"),
    "differences": (lambda o, y, t: (o[:, None] - o[None]).square().mean(), "contrastive"),
    "cosines": (lambda o, y, t: F.cosine_similarity(o[:, None], o[None], dim=2).mean(), "every other"),
    "a deviation": (lambda o, y, t: o.std(0).sum(), "over the batch"),
    "a softmax over examples": (lambda o, y, t: o.softmax(0).log().mean(), "over the batch"),
    "the worst example": (lambda o, y, t: o.max(), "over the batch"),
    "hard examples": (lambda o, y, t: none(o, y).topk(3).values.mean(), "hard examples"),
    "batch normalisation": (lambda o, y, t: F.batch_norm(o, None, None, training=True).square().mean(), "normalis"),
    "centred by batch": (lambda o, y, t: (o - o.mean(0)).square().mean(), "added up"),
    "overlap of the batch": (lambda o, y, t: 1 - (o.sigmoid() * t).sum() / (o.sigmoid().sum() + 1), "ratio"),
    "a product of means": (lambda o, y, t: o.mean() * o.square().mean(), "added up"),
    "neighbors": (lambda o, y, t: (o[1:] - o[:-1]).abs().mean(), "added up"),
    "halves": (lambda o, y, t: (o[:3] - o[3:]).square().mean(), "added up"),
    "rolled": (lambda o, y, t: (o - o.roll(1, 0)).square().mean(), "added up"),
    "permuted": (lambda o, y, t: (o * o[torch.arange(B - 1, -1, -1)]).exp().mean(), "added up"),
    "a sum": (lambda o, y, t: F.cross_entropy(o, y, reduction="sum"), "loss_reduction='sum'"),
    "a sum of what is not reduced": (lambda o, y, t: none(o, y).sum(), "loss_reduction='sum'"),
}


def views(o: Tensor) -> Tensor:
    """Returns a loss over all pairs of views, as SimCLR has it."""
    o = F.normalize(o.flatten(0, -2), dim=-1)
    return F.cross_entropy(o @ o.T, torch.arange(len(o)) ^ 1)


def faults(loss: Loss, *, mean: bool = True) -> list[str]:
    """Returns the faults of a loss, as they are seen from inside of its backward."""
    outputs = nn.Linear(4, CLASSES)(torch.randn(B, 4))
    labels, targets = torch.tensor([0, 1, 2, 3, 4, 0]), torch.rand(B, CLASSES)
    stop, found = outputs.grad_fn, []

    def look(gradient: Tensor) -> None:
        graph = read_graph([stop])
        assert graph is not None
        found.extend(faults_of(graph, examples=B, axis=0, mean=mean))

    outputs.register_hook(look)
    loss(outputs, labels, targets).backward()
    return found


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_loss_passes(name: str) -> None:
    assert faults(HONEST[name]) == []


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("name", DISHONEST)
def test_what_rescales_others_is_named(name: str) -> None:
    loss, words = DISHONEST[name]
    (fault,) = faults(loss)
    assert any(word in fault for word in words.split("|")), fault


def test_a_mean_declared_a_sum_is_named() -> None:
    assert "declared" in faults(HONEST["cross entropy"], mean=False)[0]
    assert faults(DISHONEST["a sum"][0], mean=False) == []


def test_rows_as_many_as_columns_are_no_pairs() -> None:
    for name in ("squares", "cross entropy", "a Gram matrix for each example", "centred by example"):
        outputs = nn.Linear(4, CLASSES)(torch.randn(CLASSES, 4))
        stop, found = outputs.grad_fn, []

        def look(gradient: Tensor, stop: Any = stop, found: list[str] = found) -> None:
            graph = read_graph([stop])
            assert graph is not None
            found.extend(faults_of(graph, examples=CLASSES, axis=0, mean=True))

        outputs.register_hook(look)
        HONEST[name](outputs, torch.arange(CLASSES), torch.rand(CLASSES, CLASSES)).backward()
        assert found == [], name
