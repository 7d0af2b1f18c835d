"""Law 1: one example more or less moves the sum by at most the clip norm, for every model, policy, door and input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat
from privet.clipping import PerLayer
from privet.gradients import rules
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, explicit_sum, paper_sum, reference, size
from tests.contracts.zoo import ZOO, D, batch_of, model_of, plain, squares
from tests.gradients.policies import POLICIES as GROUPED

C = 0.5
POLICIES = {"flat": Flat(C), "per layer": PerLayer(C)}
WAYS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "paper": paper_sum,
    "paper, hooks": functools.partial(paper_sum, grad_sample_mode="hooks"),
    "paper, functorch": functools.partial(paper_sum, grad_sample_mode="functorch"),
    "explicit": explicit_sum,
    "explicit, physical batches": functools.partial(explicit_sum, physical_batch_size=2),
    "explicit, padded": functools.partial(explicit_sum, physical_batch_size=3, padded=True),
}


def allowed(*sums: dict[str, Tensor], examples: int) -> float:
    """Returns the bound with the rounding that the docs state: about B u of the terms' sizes, u = 6e-8."""
    return C * (1.0 + 1e-6) + examples * 6e-8 * max(map(size, sums))


def less_one(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t[:-1] for t in batch)


def scaled(loss: Any, factor: float) -> Any:
    return lambda m, b: loss(m, b) * factor


@pytest.mark.parametrize(("door", "scale"), [("paper", 1.0), ("explicit", 1e-15), ("explicit", 1e15)])
@pytest.mark.parametrize("name", ZOO)
def test_one_example_more_moves_the_sum_by_at_most_the_clip_norm(name: str, door: str, scale: float) -> None:
    model, batch = model_of(name, torch.float32), batch_of(name, 4, dtype=torch.float32)
    policy = POLICIES["per layer" if scale == 1.0 else "flat"]
    loss = scaled(ZOO[name].loss, scale)
    more = door_sum(door, model, batch, loss=loss, policy=policy)
    less = door_sum(door, model, batch, less_one(batch), loss=loss, policy=policy)
    assert distance(more, less) <= allowed(more, less, examples=4)
    if scale >= 1.0:  # and not for lack of a gradient: a clipped example reaches the bound
        assert distance(more, less) >= 0.1 * C or name == "pruned"


def test_the_bound_above_would_catch_a_policy_that_clips_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flat, "weights", lambda self, squared: (2.0 * self.clip_norm / squared.sqrt()).clamp(max=1.0))
    model, batch = model_of("linear"), batch_of("linear", 4)
    loss = scaled(ZOO["linear"].loss, 1e3)
    more = door_sum("paper", model, batch, loss=loss, policy=Flat(C))
    less = door_sum("paper", model, less_one(batch), loss=loss, policy=Flat(C))
    assert distance(more, less) > 1.5 * allowed(more, less, examples=4)


def test_the_bound_above_would_catch_uses_whose_norms_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.linear.Linear._RULES[False]["weight"]
    whole = type(rule).squared_norms

    def apart(self: Any, uses: Any) -> Tensor:
        return torch.stack([whole(self, type(uses)((use,))) for use in uses]).sum(0)

    monkeypatch.setattr(type(rule), "squared_norms", apart)
    model = nn.Sequential(*[nn.Linear(D, D, bias=False)] * 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(D))
    batch = (torch.ones(1, D),)
    found = door_sum("paper", model, batch, loss=scaled(lambda m, b: m(*b).sum(1), 1e3), policy=Flat(C))
    assert size(found) > C * 1.2


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "name", ["linear", "convolution", "tied weights", "merged axes", "positions (1, T, D)", "attention"]
)
def test_an_example_that_is_not_finite_adds_nothing(name: str, door: str, poison: float) -> None:
    model, batch, loss = model_of(name), batch_of(name, 5), ZOO[name].loss
    bad = (batch[0].index_fill(0, torch.tensor([2]), poison), *batch[1:])
    rest = tuple(t[[0, 1, 3, 4]] for t in batch)
    expected = reference(plain(model), rest, loss, Flat(C))
    assert_exact(door_sum(door, model, bad, loss=loss, policy=Flat(C)), expected)
    assert_exact(door_sum(door, model, batch, bad, loss=loss, policy=Flat(C)), expected)


class Apart(nn.Module):
    """Two layers that see two inputs: one alone can have a gradient, or a norm, that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 4), nn.Linear(D, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return squares(self.first(a)) + squares(self.second(b))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e100], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("spoilt", [0, 1], ids=["first layer", "second layer"])
@pytest.mark.parametrize("door", WAYS)
@pytest.mark.parametrize("policy", GROUPED)
def test_an_example_that_is_not_finite_in_one_layer_adds_nothing_to_any(
    policy: str, door: str, spoilt: int, poison: float
) -> None:
    """Two in five are spoilt. Of 1e100, in float64, the gradient is finite and its squared norm is not."""
    torch.manual_seed(0)
    model, chosen, rows = Apart().double(), GROUPED[policy](Apart(), C), torch.tensor([1, 4])
    batch = (torch.randn(5, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64))
    bad = tuple(t.index_fill(0, rows, poison) if i == spoilt else t for i, t in enumerate(batch))
    rest = tuple(t[[0, 2, 3]] for t in batch)

    def loss(m: nn.Module, b: Any) -> Tensor:
        return m(*b)

    expected = reference(model, rest, loss, chosen)
    assert expected.terms > 0.5 * C
    assert_exact(WAYS[door](model, bad, loss=loss, policy=chosen), expected)
    assert_exact(WAYS[door](model, batch, bad, loss=loss, policy=chosen), expected)


@pytest.mark.parametrize("door", DOORS)
def test_gradients_that_overflow_add_nothing_and_zero_ones_are_harmless(door: str) -> None:
    model = nn.Linear(D, 2)
    batch = (torch.randn(4, D), torch.tensor([1.0, 1e30, 0.0, 1e-30]))

    def loss(m: nn.Module, b: Any) -> Tensor:
        return squares(m(b[0])) * b[1]

    found = door_sum(door, model, batch, loss=loss, policy=Flat(C))
    assert all(bool(t.isfinite().all()) for t in found.values())
    assert size(found) <= 2 * C + 1e-6
    zero = door_sum(door, model, (batch[0], torch.zeros(4)), loss=loss, policy=Flat(C))
    assert size(zero) == 0.0


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ZOO)
def test_an_empty_batch_has_a_sum_of_zero(name: str, door: str) -> None:
    model, loss = model_of(name), ZOO[name].loss
    assert size(door_sum(door, model, batch_of(name, 0), loss=loss, policy=Flat(C))) == 0.0
    assert size(door_sum(door, model, batch_of(name, 3), batch_of(name, 0), loss=loss, policy=Flat(C))) == 0.0


# -- a loss is split into its examples, or refused ---------------------------------------------------------------------


def through_criterion(criterion: Any, batch: tuple[Tensor, Tensor], *, reduction: str = "sum") -> dict[str, Tensor]:
    """Returns the sum at the paper's door of a criterion of the user's own."""
    import warnings

    from privet import PrivacyEngine
    from tests.contracts.doors import loader, taken

    torch.manual_seed(0)
    model = nn.Linear(D, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    *_, private = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader(),
        noise_multiplier=0.0,
        max_grad_norm=C,
        criterion=criterion,
        loss_reduction=reduction,
    )
    seen = taken(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a step was taken on a batch")
        private(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return {n: t * (4 if reduction == "mean" else 1) for n, t in seen[-1].items()}


CRITERIA: dict[str, Any] = {
    "mean": nn.MSELoss(),
    "sum": nn.MSELoss(reduction="sum"),
    "none": nn.MSELoss(reduction="none"),
    "a function": F.mse_loss,
    "of shape (B, 1)": lambda o, y: (o - y).square().mean(1, keepdim=True),
    "a root of a mean": lambda o, y: (o - y).square().mean().sqrt(),
    "a maximum": lambda o, y: (o - y).abs().amax(),
    "a look at values": lambda o, y: (o - y).abs().sum() if float(y.detach().sum()) > 0 else (o - y).square().sum(),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_split_whatever_its_reduction(name: str, reduction: str) -> None:
    criterion = CRITERIA[name]
    batch = torch.randn(4, D, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    found = through_criterion(criterion, batch, reduction=reduction)
    torch.manual_seed(0)
    model = nn.Linear(D, 4).double()
    expected = reference(model, batch, lambda m, b: criterion(m(b[0]), b[1]).sum().view(1), Flat(C))
    assert_exact(found, expected)


def test_a_token_average_with_ignored_tokens_is_split() -> None:
    torch.manual_seed(0)
    model = nn.Linear(D, 4).double()
    x, y = torch.randn(4, 3, D, dtype=torch.float64), torch.randint(4, (4, 3))
    y[0, 1:] = -100
    criterion = nn.CrossEntropyLoss(ignore_index=-100)

    def loss(m: nn.Module, b: Any) -> Tensor:
        return torch.stack([criterion(m(b[0][i : i + 1]).mT, b[1][i : i + 1]) for i in range(len(b[0]))])

    expected = reference(model, (x, y), loss, Flat(C))
    from privet.training.criterion import PrivateCriterion

    split = PrivateCriterion(criterion, reduction="sum", examples=lambda: None)
    found = paper_sum(model, (x, y), loss=lambda m, b: split.per_example(m(b[0]).mT, b[1]), policy=Flat(C))
    assert_exact(found, expected)
