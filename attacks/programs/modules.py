"""Modules that are replaced: does the replacement compute what the module did, and mix nothing?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attacks.doors import moved, rows
from attacks.table import Outcome, attack
from privet.validation import get_compatible_module

KIND = "replaced modules"


class NormAct(nn.BatchNorm2d):
    """A normalisation and its activation, as vision libraries have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Shifted(nn.BatchNorm2d):
    """A normalisation that adds something."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


class ActNorm(nn.BatchNorm2d):
    """An activation, and then a normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))


def same(norm: Callable[[int], nn.Module]) -> float:
    """Returns 0 if the replacement of a frozen norm computes the same in either mode, else how far it is off."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1))
    net(3.0 * rows(16, 3, 8, 8))
    net.eval()
    x = rows(4, 3, 8, 8, seed=1)
    fixed, expected = get_compatible_module(net), net(x)
    return max(1e4 * float((fixed.train(mode)(x) - expected).abs().max()) for mode in (True, False))


@attack(KIND, "a norm with an activation, statistics frozen: other numbers afterwards (in units of 1e-4)")
def _() -> Outcome:
    return same(NormAct)


@attack(KIND, "a plain norm, statistics frozen (in units of 1e-4)")
def _() -> Outcome:
    return same(nn.BatchNorm2d)


@attack(KIND, "an instance norm with statistics, frozen (in units of 1e-4)")
def _() -> Outcome:
    return same(lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True))


@attack(KIND, "a norm that adds something")
def _() -> Outcome:
    return same(Shifted)


@attack(KIND, "an activation and then a norm")
def _() -> Outcome:
    return same(ActNorm)


def _groups() -> nn.Module:
    return get_compatible_module(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 2, 1)))


@attack(KIND, "what one example moves through groups and the activation")
def _() -> Outcome:
    torch.manual_seed(0)
    return moved(_groups, (rows(6, 3, 5, 5),))
