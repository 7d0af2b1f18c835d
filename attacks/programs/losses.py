"""Losses that let one example rescale the others, and data that holds one example twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from attacks.doors import Paper, far, moved, moved_explicitly, rows
from attacks.table import Outcome, Unseen, attack

KIND = "losses"
B = 8
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
UNSEEN = "A scalar loss that is not a sum over examples"


def _net() -> nn.Module:
    return nn.Linear(3, 3)


def lossy(
    loss: Callable[[Tensor, Tensor], Tensor],
    make: Callable[[], nn.Module] = _net,
    labels: Tensor = Y,
    **options: Any,
) -> float:
    """Returns how far one label or row moves the sum under a user's own loss (of outputs and labels)."""
    found = 0.0
    x = rows(B, 3)
    for at in range(2):
        sums = []
        for changed in (False, True):
            y, z = labels.clone(), x.clone()
            if changed:
                y[at], z[at] = 2 - y[at], -100.0 * z[at]
            torch.manual_seed(0)
            run = Paper(make(), **options)
            run.step(loss(run.net(z), y))
            sums.append(run.seen[-1])
        found = max(found, far(*sums) / 2.0)
    return found


WEIGHTS = torch.tensor([1.0, 50.0, 2500.0])
OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mean weighted by class": lambda o, y: 30 * F.cross_entropy(o, y, weight=WEIGHTS),
    "labels left out by ignore_index": lambda o, y: 30 * F.cross_entropy(o, y, ignore_index=2),
    "labels of -100 left out": lambda o, y: 30 * F.cross_entropy(o, torch.where(y == 2, -100, y)),
    "(B, 1) broadcast against (B,)": lambda o, y: F.mse_loss(o[:, :1], 9.0 * y.float()),
    "the same by a difference": lambda o, y: (o[:, :1] - 9.0 * y.float()).square().mean(),
    "a sum declared a mean": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "contrastive": lambda o, y: 30 * F.cross_entropy(o @ o.T, torch.arange(B)),
    "all pairs": lambda o, y: (o[:, None] - o[None]).square().sum(2).mean(),
    "a covariance": lambda o, y: (o.T @ o / B).square().sum(),
    "a root of the mean": lambda o, y: 30 * o.square().mean().sqrt(),
    "the hardest half": lambda o, y: F.cross_entropy(o, y, reduction="none").topk(4).values.mean(),
    "a variance over the batch": lambda o, y: o.var(0).sum(),
    "an overlap of the whole batch": lambda o, y: 30 * (o.sigmoid().sum() / (1 + o.square().sum())),
    "neighbors in the batch": lambda o, y: 30 * (o[1:] - o[:-1]).square().mean(),
    "a batch normalisation of the outputs": lambda o, y: F.batch_norm(o, None, None, training=True).pow(3).mean(),
}
for _name, _loss in OWN.items():
    attack(KIND, _name)(lambda loss=_loss: lossy(loss))


@attack(KIND, "a mean declared a sum")
def _() -> Outcome:
    return lossy(F.cross_entropy, loss_reduction="sum")


@attack(KIND, "a criterion with class weights and a mean")
def _() -> Outcome:
    Paper(_net(), criterion=nn.CrossEntropyLoss(weight=WEIGHTS))
    return "nothing stopped it"


@attack(KIND, "the same as a function")
def _() -> Outcome:
    run = Paper(_net(), criterion=lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS))
    run.step(run.criterion[0](run.net(rows(B, 3)), Y))
    return "nothing stopped it"


@attack(KIND, "a criterion that was given, and another loss used")
def _() -> Outcome:
    return lossy(lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS), criterion=nn.CrossEntropyLoss())


def _split(criterion: Callable[[], Any], labels: Tensor) -> float:
    """Returns what the label of the first example moves where a criterion is split into its examples."""

    def summed(y: Tensor) -> Tensor:
        torch.manual_seed(0)
        run = Paper(_net(), criterion=criterion())
        run.step(run.criterion[0](run.net(rows(B, 3)), y))
        return run.seen[-1]

    other = labels.clone()
    other[0] = 2
    return far(summed(labels), summed(other)) / 2.0


@attack(KIND, "a criterion with ignore_index, split into its examples")
def _() -> Outcome:
    return _split(lambda: nn.CrossEntropyLoss(ignore_index=2), Y)


class Remembers(nn.Module):
    """A criterion that divides by what it has seen, and looks at values: one example after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        if int(y[0]) == 2:
            self.seen = self.seen * 1e6
        return 30.0 * F.cross_entropy(o, y) / self.seen


@attack(KIND, "a criterion with memory")
def _() -> Outcome:
    return _split(Remembers, torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]))


@attack(KIND, "explicit door: one number for the whole batch")
def _() -> Outcome:
    return moved_explicitly(_net, (rows(B, 3),), loss=lambda m, b: m(*b).square().mean())


@attack(KIND, "explicit door: (B, 1) losses")
def _() -> Outcome:
    return moved_explicitly(_net, (rows(B, 3),), loss=lambda m, b: m(*b).square().mean(1, keepdim=True))


class _WholeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor) -> Tensor:
        ctx.save_for_backward(o)
        return o.square().mean().sqrt()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (o,) = ctx.saved_tensors
        return g * o / (o.numel() * o.square().mean().sqrt())


@attack(KIND, "a loss that is one Function of the user's own")
def _() -> Outcome:
    return Unseen(UNSEEN, f"up to {lossy(lambda o, y: 0.1 * _WholeLoss.apply(30.0 * o)):.2g} C here")


@attack(KIND, "targets that were normalised over the batch")
def _() -> Outcome:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        targets = 10.0 ** (4.0 * (y == 2).float())
        return F.mse_loss(o[:, 0], targets / targets.mean())

    found = lossy(loss, labels=torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]))
    return Unseen(UNSEEN, f"{found:.2g} C here")


def mixed_up(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a batch in which each row holds a part of two examples, as mixup does."""
    return 0.6 * x + 0.4 * x.roll(1, 0), y


@attack(KIND, "mixup before the model")
def _() -> Outcome:
    found = moved(_net, (rows(B, 3), Y), replaced=True, loss=lambda m, b: 30.0 * m(mixed_up(*b)[0]).square().sum(1))
    return Unseen("Mixup and CutMix before the model", f"{found:.2g} C here (half the distance of two batches)")


class MixUp:
    """A collate function as libraries have it, by its name."""

    def __call__(self, rows: Any) -> Any:
        return mixed_up(*torch.utils.data.default_collate(rows))


@attack(KIND, "a collate function that is a MixUp")
def _() -> Outcome:
    net = _net()
    from privet import PrivacyEngine

    PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(rows(32, 3), torch.zeros(32)), batch_size=8, collate_fn=MixUp()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    return "nothing stopped it"


@attack(KIND, "a dataset that holds a record twice")
def _() -> Outcome:
    def summed(record: Tensor) -> Tensor:
        torch.manual_seed(0)
        run = Paper(_net())
        run.step(30.0 * run.net(torch.cat([rows(6, 3), record, record])).square().mean())
        return run.seen[-1]

    found = far(summed(rows(1, 3, seed=3)), summed(torch.zeros(1, 3)))
    return Unseen("A data set that holds a record twice", f"{found:.2g} C for one record in two rows")


@attack(KIND, "a dataset whose items draw other records")
def _() -> Outcome:
    data = rows(B, 3)

    def summed(first: Tensor) -> Tensor:
        torch.manual_seed(0)
        drawn = torch.cat([first, data[1:]])
        pairs = torch.stack([drawn, drawn[[0] * B]], 1)
        run = Paper(_net())
        run.step(30.0 * run.net(pairs).sum(1).square().mean())
        return run.seen[-1]

    found = far(summed(data[:1]), summed(-3.0 * data[:1])) / 2.0
    return Unseen("A data set whose items hold other records", f"{found:.2g} C for a record that all pairs hold")
