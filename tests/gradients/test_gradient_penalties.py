"""Losses that contain a gradient, against one example at a time in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts.doors import distance, explicit_sum, paper_sum, reference
from gradients.harness import captured_sum
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from privet import Flat
from privet.errors import CoverageError, PrivetError, UnsupportedModelError
from privet.gradients.rules import adjoint

B = 4
POLICY = Flat(0.5)
ROUNDING = 1e-9  # of sums of length of about 1, in double precision


def slope(y: Tensor, x: Tensor, *, create_graph: bool = True) -> Tensor:  # of the sum over the batch
    (found,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    return found


def wgan_gp(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_(True)
    y = model(x).flatten(1).sum(1)
    return y + 10.0 * (slope(y, x).flatten(1).norm(dim=1) - 1.0).square()


def forces(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_(True)
    return (slope(model(x), x) + batch[0].flip(-1)).square().flatten(1).sum(1)


def informed(model: nn.Module, batch: Any) -> Tensor:
    """Returns the residual of `u_xx = u`."""
    x = batch[0].clone().requires_grad_(True)
    u = model(x).flatten(1).sum(1)
    first = slope(u, x).flatten(1)[:, 0]
    return (slope(first, x).flatten(1)[:, 0] - u).square()


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """A gradient that is a constant for the loss."""
    x = batch[0].clone().requires_grad_(True)
    return model(x + 0.1 * slope(model(x), x, create_graph=False)).square().flatten(1).sum(1)


LOSSES = {f.__name__: f for f in (wgan_gp, forces, informed, adversarial)}


class Around(nn.Module):
    """A layer in the middle of a network that bends."""

    def __init__(self, layer: nn.Module, *, before: int = 4, after: int = 4) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, before), layer, nn.Linear(after, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.one(torch.tanh(self.one(x * self.scale)))) @ self.one.weight
        return out.sin()


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, x, x, need_weights=True)[0]  # torch's fused kernel has no second derivative
        return out


class Checkpointed(Around):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return out


def convolutions() -> nn.Module:
    up = nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1)
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), up, nn.Softplus(), nn.Flatten())


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: Around(nn.Linear(4, 4)), (4,)),
    "linear over positions": (lambda: Around(nn.Linear(4, 4)), (4, 4)),
    "convolutions": (convolutions, (2, 8, 8)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(4, 3, 3, dilation=2), nn.Tanh(), nn.Conv1d(3, 2, 2)), (4, 8)),
    "layer norm": (lambda: Around(nn.LayerNorm(4)), (4, 4)),
    "group norm": (normalised, (2, 6, 6)),
    "prelu": (lambda: Around(nn.PReLU(4)), (4,)),
    "weight norm": (lambda: Around(parametrizations.weight_norm(nn.Linear(4, 4))), (4,)),
    "tied": (Tied, (4,)),
    "cells": (Steps, (3, 4)),
    "attention": (lambda: Around(Attention()), (4, 4)),
    "checkpointed": (lambda: Checkpointed(nn.Linear(4, 4)), (4,)),
}


def case(name: str, *, examples: int = B) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    make, shape = CASES[name]
    return make().double(), (torch.randn(examples, *shape, dtype=torch.float64),)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_that_of_one_example_at_a_time(name: str, loss: str) -> None:
    module, batch = case(name)
    found = captured_sum(module, batch, LOSSES[loss], POLICY)
    expected = reference(module, batch, LOSSES[loss], POLICY)
    assert expected.terms > 0.1
    assert distance(found, expected) < ROUNDING


@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"physical_batch_size": 3, "padded": True}], ids=str)
@pytest.mark.parametrize("name", ["linear over positions", "convolutions", "layer norm"])
def test_each_way_of_a_step_is_exact_and_its_check_holds(name: str, options: dict[str, Any]) -> None:
    module, batch = case(name)
    found = explicit_sum(module, batch, loss=wgan_gp, policy=POLICY, **options)
    assert distance(found, reference(module, batch, wgan_gp, POLICY)) < ROUNDING


@pytest.mark.parametrize("loss", ["wgan_gp", "informed"])
@pytest.mark.parametrize("name", ["linear over positions", "convolutions", "group norm", "tied"])
def test_one_example_moves_the_sum_by_no_more_than_the_clip_norm(name: str, loss: str) -> None:
    module, (x,) = case(name)
    whole, without = (captured_sum(module, (rows,), LOSSES[loss], POLICY) for rows in (x, x[:-1]))
    other = captured_sum(module, (torch.cat([x[:-1], 1000.0 * x[-1:]]),), LOSSES[loss], POLICY)
    assert distance(whole, without) <= 0.5 * (1.0 + 1e-6)
    assert distance(other, without) <= 0.5 * (1.0 + 1e-6)


def test_an_example_whose_penalty_is_not_finite_contributes_nothing() -> None:
    module, (x,) = case("linear")
    with torch.no_grad():
        x[1] = 1e200  # all of tanh is flat there: the norm of a slope of zero has no gradient

    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs = batch[0].clone().requires_grad_(True)
        return slope(model(inputs), inputs).square().sum(1).sqrt()

    found = captured_sum(module, (x,), loss, POLICY)
    rest = torch.cat([x[:1], x[2:]])
    assert distance(found, reference(module, (rest,), loss, POLICY)) < ROUNDING


# -- inside of the model -----------------------------------------------------------------------------------------------


class Forces(nn.Module):
    """Returns the forces, which are a gradient that is taken in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        return -slope(self.energy(x), x)


@pytest.mark.parametrize("mode", ["auto", "functorch"])
def test_a_gradient_in_the_forward_is_exact_at_the_papers_door(mode: str) -> None:
    torch.manual_seed(0)
    module, batch = Forces().double(), (torch.randn(B, 4, dtype=torch.float64),)

    def loss(model: nn.Module, given: Any) -> Tensor:
        return model(given[0]).sub(1.0).square().sum(1)

    found = paper_sum(module, batch, loss=loss, policy=POLICY, grad_sample_mode=mode)
    assert distance(found, reference(module, batch, loss, POLICY)) < ROUNDING


def test_a_penalty_after_the_forward_is_refused_with_the_door_where_it_is_exact() -> None:
    module, batch = case("linear")
    with pytest.raises(UnsupportedModelError, match=r"after the model's forward had ended.*PrivateStep"):
        paper_sum(module, batch, loss=wgan_gp, policy=POLICY)


# -- what is not exact is refused --------------------------------------------------------------------------------------


def of_parameters(model: nn.Module, batch: Any) -> Tensor:
    y = model(batch[0]).sum(1)
    found = torch.autograd.grad(y.sum(), [*model.parameters()], create_graph=True)
    return y + sum(g.square().sum() for g in found)


def steps_inside(model: nn.Module, batch: Any) -> Tensor:
    y: Tensor = model(batch[0]).sum(1)
    y.sum().backward(retain_graph=True)
    return y


def by_torch_func(model: nn.Module, batch: Any) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: model(row[None]).sum()))(batch[0]).square().sum(1)


def vectorized(model: nn.Module, batch: Any) -> Tensor:
    found = torch.autograd.functional.jacobian(
        lambda x: model(x).sum(0), batch[0], create_graph=True, vectorize=True
    )  # fmt: skip
    return found.square().sum((0, 2))


def of_a_mean(model: nn.Module, batch: Any) -> Tensor:
    """The slope of a mean over the batch depends on how many examples there are."""
    x = batch[0].clone().requires_grad_(True)
    return torch.autograd.grad(model(x).mean(), x, create_graph=True)[0].norm(dim=1)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (of_parameters, "gradient of a parameter, which is a sum over all examples"),
        (steps_inside, "a backward came before the private model's forward had ended"),
        (by_torch_func, "transform of torch.func"),
        (vectorized, "under vmap, which hides the examples"),
        (of_a_mean, "depends on how many examples|mixed"),
    ],
)
def test_what_would_mix_or_hide_examples_is_refused(loss: Callable[..., Tensor], words: str) -> None:
    module, batch = case("linear")
    with pytest.raises(PrivetError, match=words):
        explicit_sum(module, batch, loss=loss, policy=POLICY)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0][:, -1]
        return out


def test_what_is_known_to_the_first_derivative_alone_is_refused_with_the_way_on() -> None:
    module, batch = Recurrent().double(), (torch.randn(B, 3, 4, dtype=torch.float64),)
    with pytest.raises(UnsupportedModelError, match=r"nn\.LSTM.*first derivative alone.*nn\.LSTMCell"):
        explicit_sum(module, batch, loss=wgan_gp, policy=POLICY)
    found = explicit_sum(module, batch, loss=adversarial, policy=POLICY)  # a gradient that is a constant
    assert distance(found, reference(module, batch, adversarial, POLICY)) < ROUNDING


# -- the check finds a planted bug -------------------------------------------------------------------------------------


def test_a_way_back_that_is_not_captured_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncaptured(call: Any, data: Any, values: Any, gradients: Any, needed: Any) -> Any:
        by_role = dict(zip(call.roles, values, strict=True))
        return call.operation.data_gradients(data, by_role, gradients[0], needed)

    monkeypatch.setattr("privet.gradients.capture.call._captured_again", uncaptured)
    module, batch = case("linear")
    with pytest.raises(CoverageError, match=r"(another|no) gradient was captured"):
        explicit_sum(module, batch, loss=wgan_gp, policy=POLICY)


@pytest.mark.parametrize("name", ["linear", "convolutions"])
def test_a_use_that_is_not_exchanged_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(self: Any, role: str, data: Any, gradient: Tensor, shape: Any) -> Any:
        return self.operation.use(role, (gradient,), 0.5 * data[0], shape)

    monkeypatch.setattr(adjoint.BilinearAdjoint, "use", halved)
    module, batch = case(name)
    assert distance(captured_sum(module, batch, wgan_gp, POLICY), reference(module, batch, wgan_gp, POLICY)) > 1e-3
    with pytest.raises(CoverageError, match="another gradient was captured"):
        explicit_sum(module, batch, loss=wgan_gp, policy=POLICY)


def test_a_mapped_way_back_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = adjoint.Mapped.row_gradients
    monkeypatch.setattr(adjoint.Mapped, "row_gradients", lambda *args: 0.9 * rows(*args))
    module, batch = case("layer norm")
    with pytest.raises(CoverageError, match=r"layer\.weight: another gradient was captured"):
        explicit_sum(module, batch, loss=wgan_gp, policy=POLICY)


def test_an_inner_backward_leaves_nothing_recorded() -> None:
    """The gradient that a loss contains is not the gradient of a loss: it must not count as one."""
    module, batch = case("linear")

    def constant(model: nn.Module, given: Any) -> Tensor:
        x = given[0].clone().requires_grad_(True)
        slope(model(x), x, create_graph=False)
        return model(given[0]).square().sum(1)

    found = captured_sum(module, batch, constant, POLICY)
    assert distance(found, reference(module, batch, lambda m, b: m(b[0]).square().sum(1), POLICY)) < ROUNDING
