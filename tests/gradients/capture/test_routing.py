"""Mixtures of experts: rows that belong to examples by a list."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import privet
from privet import ConfigurationError, CoverageError, Flat, UnsupportedModelError
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, reference

D, T, E = 4, 5, 3


class Experts(nn.Module):
    """Each token goes to the experts that its router likes best, which see the tokens of all examples at once."""

    def __init__(self, *, top: int = 1, owner: Any = None, routed: bool = True) -> None:
        super().__init__()
        self.router, self.last = nn.Linear(D, E), nn.Linear(D, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D), nn.LayerNorm(D)) for _ in range(E)
        )
        self.top, self.owner, self.routed = top, owner, routed

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(x).softmax(-1).reshape(-1, E).topk(self.top)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            place, rank = (chosen == e).nonzero(as_tuple=True)
            owner = place // x.shape[1] if self.owner is None else self.owner(place, x)
            with privet.rows_of(owner) if self.routed else nullcontext():
                found = expert(tokens[place])
            out = out.index_add(0, place, found * weights[place, rank].unsqueeze(1))
        return self.last(out.view_as(x)).sum(1)


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch).square().sum(1)


def batch_of(n: int) -> tuple[Tensor]:
    return (torch.randn(n, T, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64),)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("examples", [1, 2, 17, 40])
def test_the_sum_is_the_reference(door: str, top: int, examples: int) -> None:
    torch.manual_seed(0)
    net, batch = Experts(top=top).double(), batch_of(examples)
    assert_exact(door_sum(door, net, batch, loss=loss_of), reference(net, batch, loss_of, Flat(1.0)))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("index", [0, 3])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(scale: float, index: int) -> None:
    torch.manual_seed(0)
    net, (x,) = Experts(top=2).double(), batch_of(6)

    def scaled(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return loss_of(model, batch) * scale

    without = torch.cat([x[:index], x[index + 1 :]])
    whole, part = (door_sum("explicit", net, (some,), loss=scaled) for some in (x, without))
    assert distance(whole, part) <= 1.0 + 1e-6


def test_an_expert_that_nobody_asks_has_a_sum_of_zero() -> None:
    torch.manual_seed(0)
    net, batch = Experts().double(), batch_of(4)
    with torch.no_grad():
        net.router.bias[1] = -1e3
    found = door_sum("explicit", net, batch, loss=loss_of)
    assert_exact(found, reference(net, batch, loss_of, Flat(1.0)))
    assert not found["experts.1.0.weight"].any()


def test_an_expert_that_is_met_first_in_a_later_batch_is_no_surprise() -> None:
    torch.manual_seed(0)
    net, (x,) = Experts().double(), batch_of(6)
    favourite = net.router(x.reshape(-1, D)).argmax(1).mode().values
    alike = x.reshape(-1, D)[(net.router(x.reshape(-1, D)).argmax(1) == favourite)][: 2 * T].reshape(2, T, D)
    assert_exact(
        door_sum("explicit", net, (alike.detach(),), (x,), loss=loss_of), reference(net, (x,), loss_of, Flat(1.0))
    )


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(lambda place, x: place % len(x), id="positions first"),
        pytest.param(lambda place, x: torch.zeros_like(place), id="all one example's"),
        pytest.param(lambda place, x: (place // x.shape[1] + 1) % len(x), id="the neighbour's"),
    ],
)
def test_wrong_owners_are_found_out(door: str, owner: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum(door, Experts(owner=owner).double(), batch_of(6), loss=loss_of)


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (lambda place, x: place.double(), "whole numbers of shape"),
        (lambda place, x: place.unsqueeze(1), "whole numbers of shape"),
        (lambda place, x: place.tolist(), "given list"),
        (lambda place, x: place + len(x) * T, "not in a batch of"),
        (lambda place, x: place // T - len(x), "not in a batch of"),
    ],
)
def test_owners_that_are_none_are_refused(owner: Any, words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match=words):
        door_sum("explicit", Experts(owner=owner).double(), batch_of(6), loss=loss_of)


def test_without_a_word_owners_follow_the_index() -> None:
    torch.manual_seed(0)
    net, batch = Experts(routed=False).double(), batch_of(6)
    assert_exact(door_sum("explicit", net, batch, loss=loss_of), reference(net, batch, loss_of, Flat(1.0)))


class Sliding(nn.Module):
    """An operation inside that does not treat all rows alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with privet.rows_of(torch.arange(len(x))):
            return self.layer(x[:, :1]).sum((1, 2)).unsqueeze(1)


def test_operations_that_do_not_treat_rows_alike_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="rows alike"):
        door_sum("explicit", Sliding().double(), batch_of(4), loss=loss_of)


class Scaled(nn.Module):
    """Rows scaled by a parameter that meets a constant, or is expanded, to the size of the features."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.ones(1)), nn.Linear(D, 2)
        self.register_buffer("slopes", torch.arange(1.0, D + 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        place = (tokens[:, 0] > 0).nonzero()[:, 0]
        outside = self.scale * self.slopes
        with privet.rows_of(place // x.shape[1]):
            match self.way:
                case "constant":
                    scaled = tokens[place] * (self.scale * self.slopes)
                case "expand":
                    scaled = tokens[place] * self.scale.expand(D)
                case "other rows":
                    scaled = tokens[place] * outside + (x * self.scale).sum()
                case _:
                    scaled = tokens[place] * outside
        return self.last(torch.zeros_like(tokens).index_add(0, place, scaled).view_as(x)).sum(1)


def _with_rows(kept: int) -> tuple[Tensor]:
    """Returns a batch of which so many tokens are routed, of the second and third example more than of the first."""
    (x,) = batch_of(6)
    first = x[..., 0].abs().neg()
    for k in range(kept):
        first[min(k, 1), k] = 1.0 + k
    return (torch.cat([first.unsqueeze(2), x[..., 1:]], dim=2),)


def test_what_meets_a_parameter_outside_may_be_of_any_size() -> None:
    torch.manual_seed(0)
    net, later = Scaled("outside").double(), _with_rows(D)  # as many rows as features
    found = door_sum("explicit", net, batch_of(6), later, loss=loss_of)
    assert_exact(found, reference(net, later, loss_of, Flat(1.0)))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", ["constant", "expand", "other rows"])
def test_what_would_be_rows_in_some_batches_is_refused_in_all(way: str, door: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="inside rows_of"):
        door_sum(door, Scaled(way).double(), batch_of(6), loss=loss_of)


@pytest.mark.parametrize("way", ["constant", "expand"])
def test_as_many_rows_as_a_constant_has_entries_in_the_first_batch_do_not_pass_either(way: str) -> None:
    torch.manual_seed(0)
    with pytest.raises((UnsupportedModelError, CoverageError)):
        door_sum("explicit", Scaled(way).double(), _with_rows(D), batch_of(6), loss=loss_of)


class Recomputed(nn.Module):
    """Experts whose activations are computed again in the backward: whole, or each expert inside of rows_of."""

    def __init__(self, *, whole: bool, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(D, D), Experts()
        self.whole, self.reentrant = whole, reentrant

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        h = self.first(x)
        if self.whole:
            return checkpoint(self.inner, h, use_reentrant=self.reentrant)
        place = (x.reshape(-1, D)[:, 0] > 0).nonzero()[:, 0]
        with privet.rows_of(place // x.shape[1]):
            found = checkpoint(self.inner.experts[0], h.reshape(-1, D)[place], use_reentrant=self.reentrant)
        return self.inner(h.reshape(-1, D).index_add(0, place, found).view_as(h))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_that_is_computed_again_says_again_whose_its_rows_are(reentrant: bool) -> None:
    torch.manual_seed(0)
    net, batch = Recomputed(whole=True, reentrant=reentrant).double(), batch_of(6)
    twin = Recomputed(whole=True, reentrant=False).double()  # the reference asks for gradients by torch.autograd.grad
    twin.load_state_dict(net.state_dict())
    assert_exact(door_sum("explicit", net, batch, loss=loss_of), reference(twin, batch, loss_of, Flat(1.0)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_that_are_computed_again_outside_are_refused(reentrant: bool) -> None:
    torch.manual_seed(0)
    with pytest.raises((UnsupportedModelError, CoverageError)):
        door_sum("explicit", Recomputed(whole=False, reentrant=reentrant).double(), batch_of(6), loss=loss_of)


def test_outside_of_training_it_is_nothing() -> None:
    net, (x,) = Experts().double().eval(), batch_of(3)
    assert net(x).shape == (3, 2)
    with privet.rows_of(torch.tensor([0])):
        assert F.relu(torch.ones(1)).item() == 1.0
