"""State that a forward writes from the data: it leaves with the model, and nothing noised it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attacks.doors import Paper, rows
from attacks.table import Outcome, Unseen, attack

KIND = "state"


class Writing(nn.Module):
    """A layer, and something that is written in its forward."""

    def __init__(self, write: Callable[[Any, Tensor], None], **parts: Any) -> None:
        super().__init__()
        self.out, self.write, self.done = nn.Linear(3, 2), write, False
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return self.out(x + getattr(self, "loc", 0.0))


def _kept(module: nn.Module) -> list[Tensor]:
    plain = [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*module.state_dict().values(), *plain)]


def written(make: Callable[[], nn.Module]) -> Outcome:
    """Returns 0 if two runs on different data hold the same state with no learning rate, else 1000."""
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        run = Paper(make(), noise=1.0)
        for step in (0, 1):
            run.step(run.net(7.0 + rows(8, 3, seed=seed + 10 * step)).square().mean())
        states.append(_kept(run.net))
    same = len(states[0]) == len(states[1]) and all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    return 0.0 if same else "what it holds afterwards depends on the data"


def _once(module: Any, x: Tensor) -> None:
    if not module.done:
        module.done = True
        with torch.no_grad():
            module.loc.copy_(-x.mean(0))


def _averaged(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        module.loc.mul_(0.9).add_(x.mean(0), alpha=0.1)


def _registered(module: Any, x: Tensor) -> None:
    if not hasattr(module, "late"):
        module.register_buffer("late", x.mean(0).detach())


def _plain(module: Any, x: Tensor) -> None:
    module.remembered = x.detach().mean(0)


@attack(KIND, "data-dependent initialisation of a trainable parameter, with a Python flag")
def _() -> Outcome:
    return written(lambda: Writing(_once, loc=nn.Parameter(torch.zeros(3))))


@attack(KIND, "a frozen parameter as a running mean")
def _() -> Outcome:
    return written(lambda: Writing(_averaged, loc=nn.Parameter(torch.zeros(3), requires_grad=False)))


@attack(KIND, "a buffer as a running mean")
def _() -> Outcome:
    return written(lambda: Writing(_averaged, loc=torch.zeros(3)))


@attack(KIND, "a buffer registered in the first forward")
def _() -> Outcome:
    return written(lambda: Writing(_registered))


@attack(KIND, "a tensor in a plain attribute")
def _() -> Outcome:
    return written(lambda: Writing(_plain))


@attack(KIND, "max_norm of an embedding")
def _() -> Outcome:
    Paper(nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2)))
    return "nothing stopped it"


@attack(KIND, "a batch normalisation in eval mode that train() wakes up")
def _() -> Outcome:
    Paper(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval()))
    return "nothing stopped it"


@attack(KIND, "a list that the forward appends the data to")
def _() -> Outcome:
    kept: list[Tensor] = []
    run = Paper(Writing(lambda m, x: kept.append(x.detach())), noise=1.0)
    run.step(run.net(rows(8, 3)).square().mean())
    return Unseen("A copy of the data", f"{len(kept)} batches kept outside of the model")
