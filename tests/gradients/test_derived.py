"""Tensors computed from parameters alone: gradients pulled back exactly, norms taken where they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat
from privet.clipping import PerLayer
from privet.gradients.derived import Derivation, pull_back_rows
from privet.gradients.gathered import gathered
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Owner
from tests.contracts.doors import DOORS, assert_exact, door_sum, reference
from tests.contracts.zoo import squares
from tests.gradients.harness import recorded_of, trainable

WAYS: dict[str, Any] = {
    "transposed": lambda w, x: x @ w.t(),
    "transposed and straight": lambda w, x: (x @ w.t()) @ w,
    "viewed and back": lambda w, x: x @ w.view(-1).view(4, 4),
    "halves": lambda w, x: torch.cat([x @ part for part in w.chunk(2, dim=1)], dim=1),
    "overlapping slices": lambda w, x: (
        x @ w[:, :3] @ torch.ones(3, 4, dtype=w.dtype) + x @ w[:, 1:] @ torch.ones(3, 4, dtype=w.dtype)
    ),
    "one slice twice": lambda w, x: (x @ w[:, :2]).sin() @ w[:2],
    "halves of halves": lambda w, x: torch.cat([x @ q for h in w.chunk(2, 1) for q in h.chunk(2, 1)], dim=1),
    "half and whole": lambda w, x: x @ w.chunk(2, dim=1)[0] @ w[:2],
    "unbound": lambda w, x: torch.stack([x @ row for row in w.unbind(0)], dim=1),
    "scaled": lambda w, x: x @ (2.0 * w),
    "summed": lambda w, x: x * w.sum(0),
    "a scalar": lambda w, x: x * w.mean(),
    "normalised": lambda w, x: x @ F.normalize(w, dim=0),
    "inverted": lambda w, x: x @ torch.linalg.inv(w + 5 * torch.eye(4, dtype=w.dtype)),
    "with itself": lambda w, x: x @ (w @ w),
    "softmaxed": lambda w, x: x @ w.softmax(0),
    "indexed": lambda w, x: x @ w[[0, 0, 1, 3]],
    "diagonal": lambda w, x: x * w.diagonal(),
    "lower": lambda w, x: x @ w.tril(),
    "flipped": lambda w, x: x @ w.flip(0),
    "einsum": lambda w, x: torch.einsum("bi,io->bo", x, w),
    "from the left": lambda w, x: (w @ x.unsqueeze(2)).squeeze(2),
    "expanded for a bmm": lambda w, x: torch.bmm(x.unsqueeze(1), w.unsqueeze(0).expand(len(x), 4, 4)).squeeze(1),
    "baddbmm": lambda w, x: torch.baddbmm(
        w[:1].expand(len(x), 1, 4), x.unsqueeze(1), x.unsqueeze(2) * x.unsqueeze(1)
    ).squeeze(1),
    "bilinear": lambda w, x: torch.einsum("bi,ij,bj->b", x, w, x).unsqueeze(1),
    "where": lambda w, x: torch.where(x > 0, x * w[0], w[1]),
    "power": lambda w, x: (x.abs() + 1.0) ** w[0],
    "lerp": lambda w, x: torch.lerp(x, x.square(), w[0]),
    "distance": lambda w, x: torch.cdist(x, w),
    "in place": lambda w, x: x.clone().mul_(w[0]).add_(w[1]),
    "prelu": lambda w, x: F.prelu(x, w[0]),
    "clamped": lambda w, x: torch.maximum(x, w[0]),
}


class Uses(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.last = nn.Linear(4, 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        used = WAYS[self.way](self.w, x).sin()
        return self.last(x + used) if used.shape[1:] == (4,) else used.flatten(1) * self.last(x).sum(1, keepdim=True)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_from_a_parameter_to_the_data_is_exact(way: str, door: str) -> None:
    torch.manual_seed(0)
    model, batch = Uses(way).double(), (torch.randn(5, 4, dtype=torch.float64),)
    for policy in (Flat(0.5), PerLayer(0.5)):
        expected = reference(model, batch, lambda m, b: squares(m(*b)), policy)
        assert_exact(door_sum(door, model, batch, loss=lambda m, b: squares(m(*b)), policy=policy), expected)


@pytest.mark.filterwarnings("ignore:the clip norm is", "ignore:the noise multiplier is")
@pytest.mark.parametrize("way", ["summed", "a scalar", "expanded for a bmm", "scaled"])
def test_noise_of_a_pulled_back_sum_is_drawn_for_every_entry(way: str) -> None:
    from privet import Gaussian, Mechanism, Poisson, PrivateStep
    from tests.contracts.doors import taken

    model = Uses(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=Flat(1e-6), noise=Gaussian(1e6)),
        loss_per_example=lambda m, b: squares(m(*b)),
        expected_batch_size=1.0,
    )
    seen = taken(model, optimizer)
    with pytest.warns(UserWarning, match="did not come"):
        step((torch.randn(5, 4),))
    assert len(seen[-1]["w"].flatten().unique()) == 16


class Counted:
    """Counts the calls of `torch.autograd.grad`."""

    def __init__(self) -> None:
        self.calls = 0
        self._grad = torch.autograd.grad

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._grad(*args, **kwargs)


class Looks(torch.autograd.Function):
    """Three times a parameter, with a way back that torch.vmap cannot map: it looks at numbers."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return 3.0 * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3.0 * gradient if float(gradient.sum()) != 0.0 else torch.zeros_like(gradient)


MANY = torch.tensor([[0, 1, 1], [3, 0, 0]])
FEW = torch.arange(-4, 20).view(4, 6) % 7 - 3
PULLED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {  # with the calls for B examples
    "positions looked up": (lambda w, x: x + F.embedding(torch.tensor([2, 0, 1, 3]), w).sum(1), 2),
    "positions looked up, each once": (lambda w, x: x @ F.embedding(torch.tensor([2, 0, 1, 3]), w), 1),
    "one more than the parameter": (lambda w, x: x * (1.0 + w[0]), 1),
    "places, each once": (lambda w, x: x @ w[torch.tensor([2, 0, 1, 3])], 1),
    "places, some twice": (lambda w, x: x @ w[MANY[0]].mT @ torch.ones(3, 4, dtype=w.dtype), 2),
    "bias by distance": (lambda w, x: x + w[MANY].sum((0, 1)), 2),
    "few entries, many places": (lambda w, x: x + (FEW[..., None] * w[FEW]).sum((0, 1)), 2),
    "few entries, many places, embedded": (lambda w, x: x + F.embedding(FEW % 4, w).cos().sum((0, 1)), 2),
    "two sources": (lambda w, x: x @ (w @ w.t()).softmax(0), 2),
    "decay": (lambda w, x: x * (-w[0].exp()).exp(), 2),
    "mixed": (lambda w, x: x * w[0] + x.sin() * (1.0 - w[0]), 4),
    "normed": (lambda w, x: x @ torch._weight_norm(w, w.norm(dim=1, keepdim=True) + 1.0, 0), 2),
}


class Pulled(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.way = PULLED[way][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.w, x).sin()


@pytest.mark.parametrize("way", PULLED)
def test_all_rows_are_pulled_back_at_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Pulled(way).double(), (torch.randn(5, 4, dtype=torch.float64),)
    recorded = recorded_of(model, batch, lambda m, b: squares(m(*b)))
    expected = reference(model, batch, lambda m, b: squares(m(*b)), Flat(0.5))
    counted = Counted()
    monkeypatch.setattr(torch.autograd, "grad", counted)
    found = clipped_sum(recorded, trainable(model), Flat(0.5)).values
    assert counted.calls == PULLED[way][1]
    assert_exact(found, expected)


class Normed(nn.Module):
    """Weight norm: a matrix from two parameters, used by two rules."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.v = nn.Parameter(torch.rand(4, 1) + 0.5), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        w = torch._weight_norm(self.v, self.g, 0)
        return (x @ w).sin() * w[0] + x


@pytest.mark.parametrize("size", [1, 2**15])
def test_parameters_of_one_tensor_are_pulled_back_together(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.gradients.derived._SMALL", size)
    model, batch = Normed().double(), (torch.randn(5, 4, dtype=torch.float64),)
    loss = lambda m, b: squares(m(*b))  # noqa: E731
    recorded = recorded_of(model, batch, loss)
    for policy in (Flat(0.5), PerLayer(0.5)):
        expected = reference(model, batch, loss, policy)
        assert_exact(clipped_sum(recorded, trainable(model), policy).values, expected)


def test_sums_of_two_weightings_are_not_taken_for_one() -> None:
    model, batch = Normed().double(), (torch.randn(5, 4, dtype=torch.float64),)
    model.forward = lambda x: x @ torch._weight_norm(model.v, model.g, 0)  # type: ignore[method-assign]
    recorded = recorded_of(model, batch, lambda m, b: squares(m(*b)))
    found = gathered(recorded, trainable(model), Owner(5))
    one, other = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    rows = {name: mine.per_unit(slice(0, 5)) for name, mine in found.items()}
    for weights, name in ((one, "g"), (other, "v"), (other, "g"), (one, "v")):
        expected = torch.einsum("b,b...->...", weights, rows[name])
        torch.testing.assert_close(found[name].weighted_sum(weights), expected)


def test_rows_that_vmap_cannot_take_are_pulled_back_one_by_one() -> None:
    w, rows = torch.randn(4, requires_grad=True), torch.randn(5, 4)
    assert torch.equal(
        pull_back_rows(Derivation("w", Looks.apply(w), ("w",), isometric=False), [w], rows)[0], 3.0 * rows
    )


def test_rows_that_cannot_be_pulled_back_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("of its own")

    w = torch.randn(4, requires_grad=True)
    derivation = Derivation("w", 3.0 * w, ("w",), isometric=False)
    monkeypatch.setattr(torch.autograd, "grad", fails)
    with pytest.raises(ValueError, match="of its own"):
        pull_back_rows(derivation, [w], torch.randn(5, 4))
