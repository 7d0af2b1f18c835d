"""Tensors made of parameters out of torch's sight: by an autograd Function, or by writing them into a constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat
from privet.errors import PrivetError
from privet.gradients.capture import functions
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, reference

D = 4


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    """Torch's own name is back after each test, whatever tests before have left in the middle of a step."""
    functions._looking.clear()
    functions.look_at_functions(functions, None)
    yield
    assert torch.autograd.Function.__dict__["apply"] is functions.APPLY


class Scaled(torch.autograd.Function):
    """A product of two matrices, and a number."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, scale)
        return a @ b * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        a, b, scale = ctx.saved_tensors
        return gradient @ b.T * scale, a.T @ gradient * scale, None


class Sign(torch.autograd.Function):
    """The sign of a weight, whose gradient goes through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Net(nn.Module):
    """A linear map, and another one whose matrix is made of the parameters a and b in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.way = nn.Linear(D, D), way
        self.a, self.b = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, D))

    def made(self, x: Tensor) -> Tensor:
        constant = torch.zeros(D, D, dtype=x.dtype)
        places = torch.arange(2 * D)
        match self.way:
            case "function":
                return Scaled.apply(self.a, self.b, torch.tensor(2.0))
            case "function of a derived one":
                return Sign.apply(self.a @ self.b)
            case "written":
                constant[places % D, places // D] = (self.a @ self.b).flatten()[places]
                return torch.fft.ifft2(constant).real
            case "written twice":
                constant[:, :2] = self.a
                constant[1, 1:] = self.b[0, 1:] * self.b[1, 1:]
                return constant.tanh()
            case "format of data":
                return (self.a.float() @ self.b.float()).to(x)
            case _:  # refused: the view is gone when the whole is used
                constant[0][:2] = self.a[0]
                return constant + self.b.sum()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "function of data":  # refused: not of parameters alone
            return Scaled.apply(self.first(x).tanh()[:, 0], self.a @ self.b, torch.tensor(2.0)).unsqueeze(1)
        return F.linear(self.first(x).tanh(), self.made(x))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().sum((1, 2))


def made(way: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(way).double(), torch.randn(D, D, D, dtype=torch.float64)  # as many examples as positions and features


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", ["function", "function of a derived one", "written", "written twice"])
def test_the_sum_is_that_of_one_example_at_a_time(way: str, door: str) -> None:
    model, x = made(way)
    assert_exact(door_sum(door, model, (x,), loss=loss), reference(model, (x,), loss, Flat(1.0)))


def test_a_parameter_takes_the_format_of_data() -> None:
    model, x = made("format of data")
    found = door_sum("paper", model, (x,), loss=loss)
    assert_exact(found, reference(model, (x,), loss, Flat(1.0)), tolerance=1e-6)


@pytest.mark.parametrize("way", ["function", "written"])
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(way: str) -> None:
    model, x = made(way)
    whole, without, moved = (
        door_sum("explicit", model, (x,), (other,), loss=loss, policy=Flat(0.01))
        for other in (x, x[:-1], torch.cat([x[:-1], 1000.0 * x[-1:]]))
    )
    assert 0.0 < distance(whole, without) <= 0.01 * (1 + 1e-9)
    assert distance(moved, without) <= 0.01 * (1 + 1e-9)


@pytest.mark.parametrize("way", ["written into a view", "function of data"])
def test_what_stays_out_of_sight_is_refused(way: str) -> None:
    model, x = made(way)
    with pytest.raises(PrivetError, match="not captured"):
        door_sum("paper", model, (x,), loss=loss)


class Hides(torch.autograd.Function):
    """A Function of a parameter that takes data by the back door."""

    data: Tensor

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.mean = Hides.data.mean()
        return weight * ctx.mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.mean


def test_data_that_come_by_the_back_door_are_found() -> None:
    class Mixes(Net):
        def made(self, x: Tensor) -> Tensor:
            Hides.data = x.detach()
            return Hides.apply(self.a @ self.b)

    torch.manual_seed(0)
    with pytest.raises(PrivetError, match=r"mixed|gradients of half"):
        door_sum("explicit", Mixes("").double(), (made("function")[1],), loss=loss)
