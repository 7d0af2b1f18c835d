"""Rows that lie in another order than example by example: joined views, and positions outside of the batch.

The sums are those of one example at a time, whatever sizes coincide; a later batch of another size, and an example that
is removed or grows a thousandfold, move them by no more than the clip norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import Flat
from privet.errors import PrivetError
from privet.gradients.turned import Turned, same_order
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, explicit_sum, reference

D = 4
Program = Callable[[Any, Tensor, Tensor], Tensor]  # (net, a (B, T, D), b (B, T, D)) -> (B, D)
PROGRAMS: dict[str, Program] = {}


def program(function: Program) -> Program:
    PROGRAMS[function.__name__] = function
    return function


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.tower, self.head, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.convolution, self.norm = nn.Conv1d(D, D, 3, padding=1), nn.GroupNorm(2, D)
        self.token, self.recurrent = nn.Parameter(torch.randn(1, 1, D)), nn.GRU(D, D, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return PROGRAMS[self.name](self, a, b)


@program
def chunked(net: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = net.tower(torch.cat([a, b]).mean(1)).tanh().chunk(2)
    return net.last(first * second)


@program
def sliced(net: Any, a: Tensor, b: Tensor) -> Tensor:
    joined = net.tower(torch.cat([a, b]).mean(1)).tanh()
    return net.last(net.head(joined[: len(a)]).tanh() * joined[len(a) :])


@program
def split_in_three(net: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second, third = net.tower(torch.cat([a, b, a * b]).mean(1)).tanh().split(len(a))
    return net.last(torch.cat([first, second], 1)[:, ::2] + third)


@program
def stacked_views_first(net: Any, a: Tensor, b: Tensor) -> Tensor:
    both = net.tower(torch.stack([a, b]).flatten(0, 1).mean(1)).tanh()
    return net.last(both.unflatten(0, (2, len(a))).prod(0))


@program
def stacked_batch_first(net: Any, a: Tensor, b: Tensor) -> Tensor:
    both = net.tower(torch.stack([a, b], 1).flatten(0, 1).mean(1)).tanh()
    return net.last(both.unflatten(0, (len(a), 2)).prod(1))


@program
def every_position(net: Any, a: Tensor, b: Tensor) -> Tensor:
    rows = net.tower(torch.cat([a, b]).reshape(-1, D)).tanh()
    first, second = rows.view(-1, *a.shape[1:]).chunk(2)
    return net.last((first * second).sum(1))


@program
def positions_first(net: Any, a: Tensor, b: Tensor) -> Tensor:
    rows = net.tower((a - b).transpose(0, 1).flatten(0, 1)).tanh()
    return net.last(rows.unflatten(0, (a.shape[1], len(a))).sum(0))


@program
def convolved(net: Any, a: Tensor, b: Tensor) -> Tensor:
    joined = net.norm(net.convolution(torch.cat([a, b]).transpose(1, 2))).tanh().amax(2)
    first, second = joined.chunk(2)
    return net.last(net.head(first) * second)


@program
def attended_with_a_token(net: Any, a: Tensor, b: Tensor) -> Tensor:
    joined = torch.cat([a, b])
    joined = net.attention(torch.cat([net.token.expand(len(joined), -1, -1), joined], 1))[:, 0]
    return net.last(joined[: len(a)] * joined[len(a) :])


@program
def recurrent(net: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = net.recurrent(torch.cat([a, b]))[0][:, -1].chunk(2)
    return net.last(first - second)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0], batch[1]) * torch.arange(1.0, 1 + D, dtype=torch.float64)).tanh().sum(1) * batch[2]


USES = {
    "sliced": "tower head last",
    "convolved": "convolution norm head last",
    "attended_with_a_token": "token attention last",
    "recurrent": "recurrent last",
}
PARTS = ("tower", "head", "last", "convolution", "norm", "token", "recurrent", "attention")


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net(name)
    for part in set(PARTS) - set(USES.get(name, "tower last").split()):
        for p in [model.token] if part == "token" else model.get_submodule(part).parameters():
            p.requires_grad_(requires_grad=False)
    return model.double()


def batch(examples: int, positions: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(examples)
    a, b = torch.randn(2, examples, positions, D, dtype=torch.float64, generator=generator)
    return a, b, torch.ones(examples, dtype=torch.float64)


def assert_like_one_at_a_time(door: str, model: nn.Module, *batches: tuple[Tensor, ...]) -> None:
    assert_exact(door_sum(door, model, *batches, loss=loss), reference(model, batches[-1], loss, Flat(1.0)))


@pytest.mark.parametrize(
    ("name", "door"),
    [*((name, "explicit") for name in PROGRAMS), *((name, "paper") for name in ("sliced", "stacked_views_first"))],
)
def test_the_sum_is_that_of_one_example_at_a_time(name: str, door: str) -> None:
    assert_like_one_at_a_time(door, made(name), batch(D, D))  # as many examples as positions and features


@pytest.mark.parametrize("name", ["every_position", "positions_first"])
def test_later_batches_have_other_sizes(name: str) -> None:
    model = made(name)
    assert_like_one_at_a_time("explicit", model, batch(1, 2), batch(3, 2), batch(5, 4), batch(2, 6))


def test_the_first_batch_has_one_example() -> None:
    assert_like_one_at_a_time("paper", made("chunked"), batch(1, 2), batch(4, 2))


@pytest.mark.parametrize("name", ["chunked", "attended_with_a_token"])
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(name: str) -> None:
    model, whole = made(name), batch(5, 3)
    changed = tuple(torch.cat([t[:-1], 1000.0 * t[-1:]]) for t in whole[:2])
    before, without, moved = (
        door_sum("paper", model, whole, other, loss=loss, policy=Flat(0.01))
        for other in (whole, tuple(t[:-1] for t in whole), (*changed, whole[2]))
    )
    assert 0.0 < distance(before, without) <= 0.01 * (1 + 1e-9)
    assert distance(moved, without) <= 0.01 * (1 + 1e-9)


@pytest.mark.parametrize("how", [{"passes": 2}, {"padded": True}, {"physical_batch_size": 2}])
def test_joined_views_train_in_every_way(how: dict[str, Any]) -> None:
    model, whole = made("chunked"), batch(5, 3)
    found = explicit_sum(model, whole, loss=loss, policy=Flat(1.0), **how)
    assert_exact(found, reference(model, whole, loss, Flat(1.0)))


# -- what stays refused ------------------------------------------------------------------------------------------------


def similarities(net: Any, a: Tensor, b: Tensor) -> Tensor:
    z = net.tower(torch.cat([a, b]).mean(1))
    return net.last((z @ z.T).softmax(1)[: len(a)] @ z)


def next_ones_view(net: Any, a: Tensor, b: Tensor) -> Tensor:
    first, second = net.tower(torch.cat([a, b]).mean(1)).tanh().chunk(2)
    return net.last(first * second.roll(1, 0))


@pytest.mark.parametrize(("door", "mixing"), [("paper", similarities), ("explicit", next_ones_view)])
def test_views_that_meet_those_of_other_examples_are_refused(
    mixing: Program, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROGRAMS, "mixing", mixing)
    with pytest.raises(PrivetError, match=r"mixed|gradients of half|pair"):
        door_sum(door, made("mixing"), batch(4, 3), loss=loss)


def either_order(net: Any, a: Tensor, b: Tensor) -> Tensor:
    """Views outside or inside, as the data of the batch have it."""
    outside = bool(a[0, 0, 0] > 0)
    rows = torch.stack([a, b], 0 if outside else 1).flatten(0, 1).mean(1)
    both = net.tower(rows).tanh()
    return net.last(both.unflatten(0, (2, len(a))).prod(0) if outside else both.unflatten(0, (len(a), 2)).prod(1))


@pytest.mark.filterwarnings("ignore:rows were moved along the batch:UserWarning")
@pytest.mark.parametrize("door", DOORS)
def test_an_order_that_changes_with_the_data_is_exact_or_refused(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROGRAMS, "either", either_order)
    model, (a, b, ones) = made("either"), batch(4, 3)
    outside, inside = (a.abs(), b, ones), (-a.abs(), b, ones)
    for batches in ((inside, outside), (outside, inside, outside)):
        try:
            found = door_sum(door, model, *batches, loss=loss)
        except PrivetError:
            continue
        assert_exact(found, reference(model, batches[-1], loss, Flat(1.0)))


# -- orders ------------------------------------------------------------------------------------------------------------


def test_an_order_says_whose_each_row_is() -> None:
    order = Turned(2, 3)
    assert order.owner(2).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    by_example = order.examples_first(order.owner(2).unsqueeze(1), 2)
    assert by_example.shape == (2, 6, 1)
    assert by_example.squeeze(2).eq(torch.arange(2)[:, None]).all()


def test_other_numbers_of_rows_are_taken_for_known_once_two_tell_what_stays() -> None:
    assert same_order([Turned(2, 3)], 12, 2) == Turned(2, 3)
    assert same_order([Turned(2, 3)], 16, 2) is None  # 2 x B x 4, or 4 x B x 2?
    assert same_order([Turned(2, 3), Turned(2, 5)], 16, 2) == Turned(2, 4)
    assert same_order([Turned(3, 1), Turned(5, 1)], 16, 2) == Turned(8, 1)
    assert same_order([Turned(2, 3), Turned(2, 5)], 14, 2) is None
    assert same_order([Turned(2, 3), Turned(3, 5)], 24, 2) is None
