"""Law 1 for factors of any size: data that vanish beside gradients that are huge, and the reverse, at both doors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from privet.clipping import Automatic, ClippingPolicy, Flat
from privet.gradients.rows import row_norms
from privet.gradients.rules import gram, linear
from tests.contracts.doors import distance, explicit_sum, paper_sum

pytestmark = pytest.mark.filterwarnings("ignore:the clip norm is")

WAYS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "paper": paper_sum,
    "paper, hooks": functools.partial(paper_sum, grad_sample_mode="hooks"),
    "paper, functorch": functools.partial(paper_sum, grad_sample_mode="functorch"),
    "explicit": explicit_sum,
    "explicit, two passes": functools.partial(explicit_sum, passes=2),
    "explicit, padded": functools.partial(explicit_sum, physical_batch_size=3, padded=True),
}
ORDINARY = 3  # examples beside the one that is tested


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Recurrent(nn.Module):
    """The last state alone, so that no gradient grows on its way back through time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(3, 2, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class WeightedBag(nn.Module):
    """A bag of two entries, the numbers in the batch their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(4, 3, mode="sum")

    def forward(self, weights: Tensor) -> Tensor:
        ids = torch.arange(2).expand(len(weights), 2)
        return self.bag(ids, per_sample_weights=weights)


class Form(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(3, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


@dataclass(frozen=True)
class Attack:
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the data of one example
    data: float
    gradient: float  # of the example's loss with respect to each output
    bound: float = 1e-4


ATTACKS = {
    "linear, one feature": Attack(lambda: nn.Linear(1, 1, bias=False), (1,), 2.6e-23, 1.8e19),
    "linear, many features": Attack(lambda: nn.Linear(784, 1, bias=False), (784,), 2.6e-23, 1.8e19),
    "linear, subnormal data": Attack(lambda: nn.Linear(9, 1, bias=False), (9,), 1e-40, 1e38),
    "linear, huge data": Attack(lambda: nn.Linear(9, 1, bias=False), (9,), 1.8e19, 2.6e-23),
    "linear of sequences": Attack(lambda: nn.Linear(96, 64, bias=False), (3, 96), 2.6e-23, 1e18),
    "a product": Attack(Product, (5,), 2.6e-23, 1.3e19),
    "recurrence": Attack(Recurrent, (4, 3), 2.6e-23, 1e19),
    "weighted bag": Attack(WeightedBag, (2,), 2e-23, 1e19),
    "bilinear": Attack(Form, (3,), 1e12, 1e-23, 1.0),
    "bilinear, larger": Attack(Form, (3,), 1e19, 1e-23, 1.0),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # (B,)
    data, gradient = batch
    return (model(data).flatten(1) * gradient).sum(1)


def moved(way: str, attack: Attack, policy: ClippingPolicy) -> float:
    """Returns how far the example moves the sum, in clip norms."""
    torch.manual_seed(0)
    model = attack.model()
    few, ones = torch.randn(ORDINARY, *attack.shape), torch.ones(ORDINARY, 1)
    more = torch.cat([few, torch.full((1, *attack.shape), attack.data)])
    gradients = torch.cat([ones, torch.full((1, 1), attack.gradient)])
    found = WAYS[way](model, (more, gradients), loss=loss, policy=policy)
    without = WAYS[way](model, (few, ones), loss=loss, policy=policy)
    return distance(found, without) / policy.sensitivity


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_vanishing_factor_hides_no_huge_one(name: str, way: str) -> None:
    attack = ATTACKS[name]
    assert moved(way, attack, Flat(attack.bound)) <= 1.0 + 1e-3


@pytest.mark.parametrize("name", ATTACKS)
def test_a_policy_that_magnifies_small_gradients_keeps_the_bound(name: str) -> None:
    attack = ATTACKS[name]
    assert moved("explicit", attack, Automatic(attack.bound, stability=1e-10)) <= 1.0 + 1e-3


@pytest.mark.parametrize("bound", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("way", WAYS)
def test_the_clip_norm_may_be_of_any_size(way: str, bound: float) -> None:
    """Ordinary data: the example is in the sum by all of the clip norm, or by its own gradient if that is smaller."""
    attack = Attack(lambda: nn.Linear(9, 3), (9,), 0.5, 2.0, bound)
    size = moved(way, attack, Flat(bound))
    assert size <= 1.0 + 1e-3
    assert size >= 0.999 * min(1.0, 2.0 * (3 * (1 + 9 * 0.25)) ** 0.5 / bound)


def test_a_weight_that_lost_its_digits_drops_the_example() -> None:
    """A weight of 1e-43 would be known to one or two digits, and might be rounded up."""
    assert moved("explicit", Attack(lambda: nn.Linear(9, 3), (9,), 1.0, 1e12, 1e-30), Flat(1e-30)) == 0.0


def test_these_tests_would_see_squares_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "factor_norms", row_norms)
    for name in ("linear, one feature", "linear, many features", "a product"):
        assert moved("explicit", ATTACKS[name], Flat(1e-4)) > 2.0, name
    monkeypatch.setattr(gram, "lost", lambda entries, dtype: 0.0)
    assert moved("explicit", ATTACKS["linear of sequences"], Flat(1e-4)) > 2.0
