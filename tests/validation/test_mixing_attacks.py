"""Models and losses that mix examples: refused at both doors where it applies, on the first batch or soon after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import CoverageError, UnsupportedModelError
from privet.validation import find_mixing
from tests.contracts.doors import DOORS, door_sum
from tests.gradients.harness import recorded_of

B, T, D = 6, 4, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def mixed(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mixed(torch.tanh(self.layer(x))))


class Shifted(Net):
    def mixed(self, h: Tensor) -> Tensor:
        return h + torch.cat([torch.zeros_like(h[:1]), h[:-1]]).detach()


class CumulativeMean(Net):
    def mixed(self, h: Tensor) -> Tensor:
        return h + (h.cumsum(0) / torch.arange(1, len(h) + 1)[:, None]).detach()


class LastRow(Net):
    def mixed(self, h: Tensor) -> Tensor:
        h = h.clone()
        h[-1] = h[-1] + h[:-1].mean(0).detach()
        return h


class Threshold(Net):
    def mixed(self, h: Tensor) -> Tensor:
        score = h.detach().sum(1, keepdim=True)
        return h * (score >= score.mean())


class HardHalf(Net):
    """Keeps the rows that score in the top half."""

    def mixed(self, h: Tensor) -> Tensor:
        score = h.detach().square().sum(1)
        return h * (score >= score.median())[:, None]


class OnlyWithGradients(Net):
    def mixed(self, h: Tensor) -> Tensor:
        return h - h.detach().mean(0) if torch.is_grad_enabled() and h.requires_grad else h


class Gated(Net):
    """A gate that is closed at the start, as in ReZero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(D))

    def mixed(self, h: Tensor) -> Tensor:
        weights = torch.softmax(h @ h.t(), 1)
        return h + self.gate * (weights @ h)


class GatedScalar(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))


class GatedTwice(Gated):
    """Closed so well that not even the gate has a gradient."""

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.gate * self.gate * h.detach().roll(1, 0)


class DerivedFromData(Gated):
    """The mean over the batch has no batch axis, and so looked like a constant."""

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.gate * h.mean(0)


class FrozenRecurrent(nn.Module):
    """The batch is taken for time."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = nn.LSTM(D, D).requires_grad_(False), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x[:, None, :].expand(-1, T, -1))[0][:, -1])


class FrozenCausal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.TransformerEncoderLayer(D, 2, dim_feedforward=8, dropout=0.0).requires_grad_(False)
        self.last = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.last(self.part(x[:, None, :], src_mask=mask)[:, 0])


class _Scaled(torch.autograd.Function):
    """The identity, whose backward is scaled by the batch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return g * h.norm(dim=1).mean()


class MixedBackward(Net):
    def mixed(self, h: Tensor) -> Tensor:
        return _Scaled.apply(h)


class HookedBackward(Net):
    def mixed(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            size = h.detach().norm(dim=1).mean()
            h.register_hook(lambda g: g * size)
        return h


class ShiftedBackward(Net):
    def mixed(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            sizes = h.detach().norm(dim=1, keepdim=True).roll(1, 0)
            h.register_hook(lambda g: g * sizes)
        return h


class ByCount(Net):
    def mixed(self, h: Tensor) -> Tensor:
        return h / len(h)


FORWARD = [
    Shifted, CumulativeMean, LastRow, Threshold, HardHalf, OnlyWithGradients, Gated, GatedScalar, GatedTwice,
    DerivedFromData, FrozenRecurrent, FrozenCausal, ByCount,
]  # fmt: skip
BACKWARD = [MixedBackward, HookedBackward, ShiftedBackward]


def loss_of(m: nn.Module, batch: Any) -> Tensor:
    return m(batch[0]).square().sum(1)


def refused(door: str, model: nn.Module, *batches: Any, loss: Callable[[nn.Module, Any], Tensor] = loss_of) -> str:
    with pytest.raises((CoverageError, UnsupportedModelError)) as caught:
        door_sum(door, model, *batches, loss=loss)
    return str(caught.value)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [*FORWARD, *BACKWARD], ids=lambda kind: kind.__name__)
def test_what_mixes_is_refused_on_the_first_batch(kind: type[nn.Module], seed: int, door: str) -> None:
    torch.manual_seed(seed)
    refused(door, kind(), (torch.randn(B, D),))


@pytest.mark.parametrize("examples", [2, 3, 40])
@pytest.mark.parametrize("kind", [Shifted, LastRow, Gated, MixedBackward, ByCount], ids=lambda kind: kind.__name__)
def test_small_and_large_batches_show_it_too(kind: type[nn.Module], examples: int) -> None:
    refused("paper", kind(), (torch.randn(examples, D),))


def test_a_constant_that_needs_a_gradient_is_not_made_a_part_of_a_parameter() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a gradient and has no batch axis"):
        recorded_of(DerivedFromData(), (torch.randn(B, D),), loss_of)


def test_memory_in_a_place_that_nobody_sees_is_found() -> None:
    class Remembers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            output = x + sum(remembered[-1:])
            remembered.append(float(x.sum()))
            return output

    remembered: list[float] = []
    assert any("batches before" in each for each in find_mixing(Remembers(), (torch.randn(B, D),)))


@pytest.mark.parametrize("examples", [4, 16, 17, 40])
def test_every_ordered_pair_of_examples_is_tested(examples: int) -> None:
    class OnePair(nn.Module):
        """Row i feels row j, and no other pair meets."""

        def forward(self, x: Tensor) -> Tensor:
            return x + F.one_hot(torch.tensor(self.i), len(x))[:, None] * x[self.j]

    model, x = OnePair(), torch.randn(examples, 2)
    last = examples - 1
    for model.i, model.j in ((0, 1), (1, 0), (0, last), (last, 0), (last - 1, last), (2, 1), (1, 2)):
        assert find_mixing(model, (x,)), (model.i, model.j)


@pytest.mark.parametrize("seed", range(8))
def test_integers_are_moved_and_not_scaled(seed: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, D)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.table(ids).mean(1)
            return h + h.roll(1, 0).detach() if self.mixes else h

    torch.manual_seed(seed)
    model, ids = Tokens(), torch.randint(9, (B, T))
    for model.mixes in (False, True):
        assert bool(find_mixing(model, (ids,))) is model.mixes


# -- the loss of the explicit door -------------------------------------------------------------------------------------


def _beside_its_neighbor(m: nn.Module, batch: Any) -> Tensor:
    losses = m(batch[0]).square().sum(1)
    return losses * losses.detach().roll(1)


def _divided(m: nn.Module, batch: Any) -> Tensor:
    return m(batch[0]).square().sum(1) / len(batch[0])


def _remembering() -> Callable[[nn.Module, Any], Tensor]:
    memory = {"mean": 1.0}

    def loss(m: nn.Module, batch: Any) -> Tensor:
        losses = m(batch[0]).square().sum(1)
        scaled = losses / memory["mean"]
        memory["mean"] = 0.9 * memory["mean"] + 0.1 * float(losses.mean())
        return scaled

    return loss


class Average(nn.Module):
    """A loss with a buffer of its own, which the door sees in the function's closure alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, losses: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * losses.mean())
        return losses


@pytest.mark.parametrize("loss", [_beside_its_neighbor, _divided, _remembering()], ids=["neighbor", "count", "memory"])
def test_a_loss_that_depends_on_more_than_its_example_is_refused(loss: Any) -> None:
    refused("explicit", nn.Linear(D, 2), (torch.randn(B, D),), loss=loss)


def test_a_loss_module_held_by_the_function_is_looked_at_and_put_back() -> None:
    average = Average()
    text = refused("explicit", nn.Linear(D, 2), (torch.randn(B, D),), loss=lambda m, b: average(loss_of(m, b)))
    assert "mean: it is written from the data" in text
    assert average.mean == 1.0


def test_a_loss_divided_by_the_size_of_a_batch_is_found_beside_dropout() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, 2))
    assert "public constant" in refused("explicit", model, (torch.randn(B, D),), loss=_divided)
    door_sum("explicit", model, (torch.randn(B, D),), loss=loss_of)


# -- later batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
def test_a_branch_that_mixes_from_the_second_batch_on_is_found_at_the_eighth(door: str) -> None:
    class Later(Net):
        def mixed(self, h: Tensor) -> Tensor:
            return h + h.detach().mean(0) if self.on else h

    def loss(m: nn.Module, batch: Any) -> Tensor:
        m.on = batch[1]
        return loss_of(m, batch)

    batches = [(torch.randn(B, D), False), *((torch.randn(B, D), True) for _ in range(6))]
    door_sum(door, Later(), *batches, loss=loss)  # not yet looked at again
    refused(door, Later(), *batches, batches[-1], loss=loss)


# -- what the error says -----------------------------------------------------------------------------------------------


def test_the_error_names_the_idiom() -> None:
    x = torch.randn(B, D)
    assert "batch_first=True" in refused("paper", FrozenRecurrent(), (x,))
    assert "statistics" in refused("paper", Threshold(), (x,))
    assert "public constant" in refused("paper", ByCount(), (x,))
    assert "in the backward" in refused("paper", MixedBackward(), (x,))
    assert "statistics" in refused("paper", DerivedFromData(), (x,))
