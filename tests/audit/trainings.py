"""DP-SGD in the plainest form, one example at a time, and the mistakes that an audit must find.

It shares nothing with the library: what the audit says of it is said of the audit, not of the library's own code.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from privet.accounting import GaussianEvent, PartitionEvent, PoissonEvent, SelfComposedEvent

CLIP = 1.0


def data(count: int = 24) -> torch.utils.data.TensorDataset:
    g = torch.Generator().manual_seed(5)
    return torch.utils.data.TensorDataset(torch.randn(count, 6, generator=g), torch.randint(3, (count,), generator=g))


class Tied(nn.Module):
    """A matrix that is used twice, so that the norm of its gradient has a cross term."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(6) + 0.1)

    def forward(self, x):
        return (x @ self.matrix) @ self.matrix


class PlainTraining:
    """`train(model, dataset)` with full batches, or Poisson ones of a rate, and at most one mistake."""

    def __init__(self, *, sigma=1.0, steps=3, rate=None, mistake=None, seed=0) -> None:
        self.sigma, self.steps, self.rate, self.mistake = sigma, steps, rate, mistake
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model, dataset):
        model.train()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        for batch in self.batches(len(dataset)):
            if self.mistake == "a step skipped on an empty batch" and not batch:
                continue
            sums = self.summed(model, parameters, [dataset[i] for i in batch])
            noises = [torch.randn(p.shape, generator=self.generator) for p in parameters]
            if self.mistake == "one stream for two shards":
                noises = [torch.cat([n[: len(n) // 2], n[: len(n) // 2], n[2 * (len(n) // 2) :]]) for n in noises]
            if self.mistake == "noise used again in the next step":
                noises = self.kept = getattr(self, "kept", noises)
            scale = self.sigma * CLIP * self.factor(len(batch))
            for p, total, noise in zip(parameters, sums, noises, strict=True):
                p.grad = (total + scale * noise) / max(len(dataset) * (self.rate or 1.0), 1.0)
            optimizer.step()
        return self.claim()

    def claim(self):
        event = GaussianEvent(self.sigma)
        if self.mistake == "a partition billed once for five passes":
            return PartitionEvent(1, event)
        if self.rate is not None:
            billed = self.rate / 2.0 if self.mistake == "a rate twice what is billed" else self.rate
            event = PoissonEvent(billed, event)
        return SelfComposedEvent(event, self.steps)

    def batches(self, count):
        if self.mistake == "a shuffled loader billed as Poisson":
            size = max(1, round(count * self.rate))
            for start in range(0, self.steps * size, size):
                if start % count < size:
                    order = torch.randperm(count, generator=self.generator).tolist()
                yield [order[(start + i) % count] for i in range(size)]
            return
        for _ in range(self.steps):
            if self.rate is None:
                yield list(range(count))
            else:
                yield (torch.rand(count, generator=self.generator) < self.rate).nonzero().flatten().tolist()

    def factor(self, size):
        return {
            "noise divided by the batch size": 1.0 / max(size, 1),
            "noise divided by the world size": 1.0 / 4.0,
            "noise divided by the root of the world size": 1.0 / 2.0,
            "noise once per physical batch at the wrong scale": math.sqrt(4.0) / 4.0,
            "a clip norm that changes between clip and noise": 0.5,
        }.get(self.mistake, 1.0)

    def summed(self, model, parameters, records):
        total = [torch.zeros_like(p) for p in parameters]
        plain = [torch.zeros_like(p) for p in parameters]
        for index, (x, y) in enumerate(records):
            uses = self.gradients(model, parameters, x, y)
            gradients = [sum(parts) for parts in uses]
            if self.mistake == "tied weights without the cross term":
                norm = math.sqrt(sum(float(part.square().sum()) for parts in uses for part in parts))
            else:
                norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            weight = min(1.0, CLIP / norm) if norm else 0.0
            copies = 2 if self.mistake == "an example in the sum twice" and index % 2 else 1
            copies = 2 if self.mistake == "rows of one example counted as several" else copies
            for t, p, g in zip(total, plain, gradients, strict=True):
                t.add_(g, alpha=copies * weight)
                p.add_(g, alpha=1.0 / len(records))
        if self.mistake == "a non-private gradient beside the private one":
            return [t + p for t, p in zip(total, plain, strict=True)]
        if self.mistake == "clipping after averaging":
            norm = math.sqrt(sum(float(p.square().sum()) for p in plain))
            # Averages are clipped to C, and noise is added to the sum as if every example had been.
            return [p * min(1.0, CLIP / norm) * len(records) for p in plain]
        return total

    def gradients(self, model, parameters, x, y):
        """Returns for each parameter the gradients of its uses; more than one of a matrix that is used twice."""
        if not isinstance(model, Tied):
            loss = F.cross_entropy(model(x[None]), y[None])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [[torch.zeros_like(p) if g is None else g] for p, g in zip(parameters, found, strict=True)]
        whole = self.gradients_of(model, parameters, x, y)
        first = self.gradients_of(model, parameters, x, y, only="first")
        return [[a, w - a] for a, w in zip(first, whole, strict=True)]

    def gradients_of(self, model, parameters, x, y, only=None):
        forward = model.forward
        if only == "first":  # the second use is held fixed; it is forward that is replaced, so that hooks still run
            model.forward = lambda x: (x @ model.matrix) @ model.matrix.detach()
        try:
            loss = F.cross_entropy(model(x[None]), y[None])
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            if only:
                model.forward = forward
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
