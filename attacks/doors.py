"""Both doors with noise off, and how far one example moves what they hand to the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep

__all__ = ["Paper", "far", "moved", "moved_explicitly", "others_moved", "rows", "squares"]

Batch = tuple[Tensor, ...]
Make = Callable[[], nn.Module]
Loss = Callable[[nn.Module, Batch], Tensor]
N = 32
torch.set_num_threads(1)


def squares(model: nn.Module, batch: Batch) -> Tensor:
    """Returns long gradients for each example, so that all are clipped."""
    return 50.0 * model(*batch).flatten(1).pow(2).sum(1)


def rows(examples: int, *shape: int, seed: int = 0) -> Tensor:
    """Returns public random examples."""
    return torch.randn(examples, *shape, generator=torch.Generator().manual_seed(seed))


class Paper:
    """A run at the paper's door."""

    def __init__(
        self,
        net: nn.Module,
        data: Any = None,
        *,
        noise: float = 0.0,
        clip: float = 1.0,
        batch_size: int = 8,
        engine: PrivacyEngine | None = None,
        **options: Any,
    ) -> None:
        self.net = net
        self.optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=options.pop("lr", 0.0))
        self.engine = PrivacyEngine(accountant="rdp") if engine is None else engine
        data = TensorDataset(torch.zeros(N, 1)) if data is None else data
        loader = DataLoader(data, batch_size=batch_size, shuffle=options.pop("shuffle", False))
        _, _, self.loader, *self.criterion = self.engine.make_private(
            module=net, optimizer=self.optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=clip,
            **options,
        )  # fmt: skip
        self.scale = float(batch_size) if options.get("loss_reduction", "mean") == "mean" else 1.0
        self.seen: list[Tensor] = []
        self.optimizer.register_step_post_hook(self._look)

    def _look(self, *rest: Any) -> None:
        found = [p.grad.flatten().double() for p in self.net.parameters() if p.grad is not None]
        self.seen.append(torch.cat(found) * self.scale)

    def step(self, loss: Tensor) -> None:
        """Trains on a loss."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def moved(
    make: Make, batch: Batch, *, loss: Loss = squares, clip: float = 1.0, before: Sequence[Batch] = (),
    reduce: Callable[[Tensor], Tensor] = torch.sum, replaced: bool = False, **options: Any,
) -> float:  # fmt: skip
    """Returns how far one example moves the sum at the paper's door, in units of C.

    Args:
        make: returns the model; it is called with one seed.
        batch: the batch that is looked at, after those of `before`.
        loss: per example.
        clip: C.
        before: batches that are trained on first.
        reduce: from the examples' losses to the loss.
        replaced: whether only neighbors of the same size are tried.
        options: of the door.
    """
    summed = _by_paper(make, loss, clip, before, reduce=reduce, **options)
    return _farthest(summed, batch, clip, replaced=replaced)


def moved_explicitly(
    make: Make, batch: Batch, *, loss: Loss = squares, clip: float = 1.0, before: Sequence[Batch] = (),
    replaced: bool = False,
) -> float:  # fmt: skip
    """Returns the same at the explicit door."""
    return _farthest(_explicitly(make, loss, clip, before), batch, clip, replaced=replaced)


def others_moved(
    make: Make, x: Tensor, *, factor: float = 50.0, before: Sequence[Tensor] = (), explicit: bool = False,
    scales: Sequence[float] = (-1.0, 0.0, 30.0, 1e3),
) -> float:  # fmt: skip
    """Returns 1 and how far one example, whose own loss counts for nothing, moves the others' part of the sum.

    Its own part may add C in the same direction, hence the 1.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return factor * batch[1] * model(batch[0]).flatten(1).pow(2).sum(1)

    first = [(each, torch.ones(len(each))) for each in before]
    summed = _explicitly(make, loss, 1.0, first) if explicit else _by_paper(make, loss, 1.0, first, reduce=torch.sum)
    found = 0.0
    for at in (0, len(x) - 1):
        counts = torch.ones(len(x))
        counts[at] = 0.0
        whole = summed((x, counts))
        for scale in scales:
            other = x.clone()
            other[at] *= scale
            found = max(found, float((whole - summed((other, counts))).norm()))
    return 1.0 + found


def _by_paper(
    make: Make, loss: Loss, clip: float, before: Sequence[Batch], *, reduce: Callable[[Tensor], Tensor], **options: Any
) -> Callable[[Batch], Tensor]:
    options = {"loss_reduction": "sum" if reduce is torch.sum else "mean", **options}

    def summed(last: Batch) -> Tensor:
        torch.manual_seed(0)
        run = Paper(make(), clip=clip, **options)
        for each in (*before, last):
            run.step(reduce(loss(run.net, each)))
        return run.seen[-1]

    return summed


def _explicitly(make: Make, loss: Loss, clip: float, before: Sequence[Batch]) -> Callable[[Batch], Tensor]:
    def summed(last: Batch) -> Tensor:
        torch.manual_seed(0)
        net, seen = make(), []
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
        step = PrivateStep(
            net,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(0.25), clipping=Flat(clip), noise=Gaussian(0.0)),
            loss_per_example=loss,
            expected_batch_size=1.0,
        )

        def look(*rest: Any) -> None:
            seen.append(torch.cat([p.grad.flatten().double() for p in net.parameters() if p.grad is not None]))

        optimizer.register_step_post_hook(look)
        for each in (*before, last):
            step(each)
        return seen[-1]

    return summed


def _farthest(summed: Callable[[Batch], Tensor], batch: Batch, clip: float, *, replaced: bool) -> float:
    whole, found = summed(batch), 0.0
    last = len(batch[0]) - 1
    for at in (0, last):
        others = tuple(t[[i for i in range(last + 1) if i != at]] for t in batch)
        if not replaced:
            found = max(found, float((whole - summed(others)).norm()) / clip)
        other = tuple(t.clone() for t in batch)
        for t, source in zip(other, batch, strict=True):
            t[at] = -3.0 * source[at] if t.is_floating_point() else source[last - at]
        found = max(found, float((whole - summed(other)).norm()) / (2.0 * clip))
    return found


def far(a: Tensor, b: Tensor) -> float:
    """Returns the distance of two sums."""
    return float((a - b).norm())
