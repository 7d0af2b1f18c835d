"""The norm of a row does not depend on what other rows of the batch are, nor on how far it is filled up with zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.rules import bilinear, convolution, linear
from privet.gradients.rules.convolution import Convolution, Geometry
from privet.gradients.rules.convolution_strategy import ConvolutionStrategy
from privet.gradients.rules.linear import Linear
from privet.gradients.rules.strategy import Strategy
from privet.gradients.use import Use, Uses

ROWS, POSITIONS, FEATURES = 6, 8, 32


def nearly_cancelling(rows: int, positions: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns activations and gradients whose terms are of one size and mostly cancel: bounds on norms are large."""
    signs = torch.tensor([1.0, -1.0]).repeat(positions // 2)
    a = 1.0 + 0.5 * torch.randn(rows, positions, size)
    return a, signs.view(1, -1, 1) * (1.0 + 0.5 * torch.randn(rows, positions, size))


def cancelling(positions: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns one row whose terms cancel to rounding: no Gram norm of it can be trusted."""
    a, g = torch.ones(1, positions, size), torch.ones(1, positions, size)
    g[:, 1::2] = -1.0
    return a, g * (1.0 + 1e-6 * torch.randn(1, positions, size))


def of_linear(a: Tensor, g: Tensor) -> Tensor:
    use = Use(Linear(), "weight", (a,), g, (g.shape[2], a.shape[2]))
    return use.rule.squared_norms(Uses((use,)))


def of_convolution(a: Tensor, g: Tensor) -> Tensor:
    operation = Convolution(F.conv1d, Geometry((1,), (0,), (1,), 1, None))
    use = Use(operation, "weight", (a.mT.contiguous(),), g.mT.contiguous(), (g.shape[2], a.shape[2], 1))
    return use.rule.squared_norms(Uses((use,)))


def of_bilinear(a: Tensor, g: Tensor) -> Tensor:
    other = torch.ones(*a.shape[:2], 2)
    use = Use(bilinear.Bilinear(), "weight", (a, other), g, (g.shape[2], a.shape[2], 2))
    return use.rule.squared_norms(Uses((use,)))


WAYS = [
    (of_linear, Strategy.GRAM, Strategy.TILES),
    (of_convolution, ConvolutionStrategy.PIXELS, ConvolutionStrategy.TILES),
    (of_bilinear, Strategy.GRAM, Strategy.TILES),
]


def choose(way, monkeypatch):
    module, name = {
        Strategy: (linear, "linear_strategy"),
        ConvolutionStrategy: (convolution, "convolution_strategy"),
    }[type(way)]
    monkeypatch.setattr(module, name, lambda *args, **kwargs: way)


@pytest.mark.parametrize(("norms", "gram", "_tiles"), WAYS)
def test_a_row_whose_bound_is_wide_changes_no_norm_but_its_own(norms, gram, _tiles, monkeypatch):
    torch.manual_seed(3)
    choose(gram, monkeypatch)
    a, g = nearly_cancelling(ROWS, POSITIONS, FEATURES)
    alone = norms(a, g)
    another, its_gradient = cancelling(POSITIONS, FEATURES)
    beside = norms(torch.cat([a, another]), torch.cat([g, its_gradient]))
    assert torch.allclose(beside[:-1], alone, rtol=2e-6, atol=0.0)
    true = (its_gradient[0].double().mT @ another[0].double()).square().sum()
    assert float(beside[-1]) >= float(true)
    # The bounds are of a size that such a switch of the formula would show.
    exact = torch.bmm(g.double().mT, a.double()).flatten(1).square().sum(1)
    assert float((alone / exact - 1).max()) > 1e-5


@pytest.mark.parametrize(("norms", "_gram", "tiles"), WAYS)
def test_zeros_that_fill_up_change_no_norm(norms, _gram, tiles, monkeypatch):
    torch.manual_seed(4)
    choose(tiles, monkeypatch)
    # Two positions that cancel to a thousandth: the padding is of the terms' size, and so large beside the norm.
    a = torch.ones(ROWS, 2, FEATURES)
    g = torch.randn(ROWS, 1, FEATURES) * torch.tensor([1.0, -0.999]).view(1, 2, 1)
    short = norms(a, g)
    filled = norms(F.pad(a, (0, 0, 0, 400)), F.pad(g, (0, 0, 0, 400)))
    assert torch.allclose(filled, short, rtol=1e-4, atol=0.0)
