"""Rows that a model moves along the batch: their sum is that of one example at a time, or the batch is refused.

The first batch is harmless: every example has as many rows as the others, in the order of the batch. In a later one the
number of rows fits by coincidence, and they are other examples' rows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat
from privet.errors import PrivetError
from tests.contracts.doors import DOORS, assert_exact, door_sum, explicit_sum, paper_sum, reference

B, T, D = 4, 5, 3
Program = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (b, h (B, T, D), chosen (B, T)) -> (B, 2)
PROGRAMS: dict[str, Program] = {}


def program(function: Program) -> Program:
    PROGRAMS[function.__name__] = function
    return function


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.a, self.b, self.positions, self.name = nn.Linear(D, D), nn.Linear(D, 2), nn.Embedding(T, D), name

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return PROGRAMS[self.name](self, self.a(x), chosen)


def by_example(rows: Tensor, owner: Tensor, examples: int) -> Tensor:  # (R, 2), (R,) -> (B, 2)
    return rows.new_zeros(examples, rows.shape[1]).index_add(0, owner, rows.tanh())


def owners(chosen: Tensor) -> Tensor:
    return chosen.nonzero()[:, 0]


def pick(table: Tensor, places: Tensor) -> Tensor:
    return table[places]


# -- chosen rows -------------------------------------------------------------------------------------------------------


@program
def mask(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    return by_example(net.b(h[chosen]), owners(chosen), len(h))


@program
def mask_put_back(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    out = h.new_zeros(*chosen.shape, 2)
    out[chosen] = net.b(h[chosen])
    return out.sum(1)


@program
def hidden_in_a_function(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    def inner(places: Tensor) -> Tensor:
        return net.b(pick(h.flatten(0, 1), places))

    return by_example(inner(chosen.flatten().nonzero()[:, 0]), owners(chosen), len(h))


@program
def index_select(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    places = chosen.flatten().nonzero()[:, 0]
    return by_example(net.b(h.flatten(0, 1).index_select(0, places)), owners(chosen), len(h))


@program
def masked_select(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    return by_example(net.b(h.masked_select(chosen[..., None]).view(-1, D)), owners(chosen), len(h))


@program
def take(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    places = chosen.flatten().nonzero() * D + torch.arange(D)
    return by_example(net.b(torch.take(h, places)), owners(chosen), len(h))


@program
def looked_up_in_data(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    places = chosen.flatten().nonzero()[:, 0]
    return by_example(net.b(F.embedding(places, h.flatten(0, 1))), owners(chosen), len(h))


@program
def product_with_a_selection(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    places = chosen.flatten().nonzero()[:, 0]
    chooses = F.one_hot(places, chosen.numel()).to(h)
    return by_example(net.b(chooses @ h.flatten(0, 1)), owners(chosen), len(h))


@program
def einsum_with_a_selection(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    chooses = F.one_hot(chosen.flatten().nonzero()[:, 0], chosen.numel()).to(h)
    return by_example(net.b(torch.einsum("rn,nd->rd", chooses, h.flatten(0, 1))), owners(chosen), len(h))


@program
def cut_by_lengths_and_joined(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    lengths = chosen.sum(1).tolist()
    rows = torch.cat([h[i, :n] for i, n in enumerate(lengths)])
    return by_example(net.b(rows), torch.arange(len(h)).repeat_interleave(chosen.sum(1)), len(h))


@program
def split_and_joined(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    pieces = [row[:n] for row, n in zip(h.unbind(0), chosen.sum(1).tolist(), strict=True)]
    return by_example(net.b(torch.cat(pieces)), torch.arange(len(h)).repeat_interleave(chosen.sum(1)), len(h))


@program
def repeated_by_data(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    counts = chosen.sum(1)
    return by_example(
        net.b(h.mean(1).repeat_interleave(counts, 0)), torch.arange(len(h)).repeat_interleave(counts), len(h)
    )


@program
def copied_into_a_buffer(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    rows = h.new_zeros(int(chosen.sum()), D)
    rows[:] = h[chosen]
    return by_example(net.b(rows), owners(chosen), len(h))


@program
def put_into_a_buffer(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    count = int(chosen.sum())
    rows = h.new_zeros(count, D).index_copy(0, torch.arange(count), h[chosen])
    return by_example(net.b(rows), owners(chosen), len(h))


@program
def positions_of_what_was_chosen(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    return h.mean((1, 2))[:, None] * by_example(net.positions(chosen.nonzero()[:, 1]), owners(chosen), len(h))[:, :2]


@program
def positions_by_way_of_python(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    places = torch.tensor([p for row in chosen.tolist() for p, is_one in enumerate(row) if is_one])
    return h.mean((1, 2))[:, None] * by_example(net.positions(places), owners(chosen), len(h))[:, :2]


# -- another order -----------------------------------------------------------------------------------------------------


def order_of(chosen: Tensor) -> Tensor:
    return chosen.sum(1).argsort(stable=True, descending=True)


@program
def sorted_and_put_back(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    order = order_of(chosen)
    return net.b(h[order].tanh())[order.argsort()].sum(1)


@program
def gathered_along_the_batch(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    order = order_of(chosen)
    rows = h.gather(0, order[:, None, None].expand_as(h))
    return net.b(rows)[order.argsort()].sum(1)


@program
def taken_apart_and_stacked(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    order = order_of(chosen)
    rows = h.unbind(0)
    return net.b(torch.stack([rows[i] for i in order.tolist()]))[order.argsort()].sum(1)


@program
def narrowed_one_by_one(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    order = order_of(chosen)
    return net.b(torch.cat([h.narrow(0, i, 1) for i in order.tolist()]))[order.argsort()].sum(1)


@program
def rolled_and_back(net: Any, h: Tensor, chosen: Tensor) -> Tensor:
    by = int(order_of(chosen)[0])
    return net.b(h.roll(by, 0)).roll(-by, 0).sum(1)


def batch(name: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name)))
    x = x * torch.tensor([1.0, 3.0, 0.3, 2.0])[:, None, None]
    chosen = torch.zeros(B, T, dtype=torch.bool)
    match name:
        case "equal":  # two rows of each example
            chosen[:, :2] = True
        case "all of one":  # as many rows as examples
            chosen[2, :4] = True
        case "uneven":  # a multiple of the batch, not in its order
            for i, n in enumerate((1, 4, 0, 3)):
                chosen[i, :n] = True
    return x, chosen


def loss_of(m: nn.Module, b: Any) -> Tensor:
    return 10.0 * m(*b).square().sum(1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rows were moved along the batch")
        yield


def assert_exact_or_refused(find: Callable[[], Any], net: nn.Module, last: Any) -> bool:
    """Returns whether the batch was trained on."""
    try:
        with quiet():
            found = find()
    except PrivetError:
        return False
    assert_exact(found, reference(net, last, loss_of, Flat(0.5)))
    return True


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_moved_rows_are_exact_or_refused(name: str, door: str) -> None:
    torch.manual_seed(0)
    net = Net(name).double()
    for kind in ("equal", "all of one", "uneven"):
        last = batch(kind)
        assert_exact_or_refused(
            lambda last=last: door_sum(door, net, batch("equal"), last, loss=loss_of, policy=Flat(0.5)), net, last
        )


WAYS: dict[str, Callable[..., Any]] = {
    "hooks": lambda *a, **k: paper_sum(*a, **k, grad_sample_mode="hooks"),
    "functorch": lambda *a, **k: paper_sum(*a, **k, grad_sample_mode="functorch"),
    "two passes": lambda *a, **k: explicit_sum(*a, **k, passes=2),
    "padded": lambda *a, **k: explicit_sum(*a, **k, physical_batch_size=5, padded=True),
    "physical": lambda *a, **k: explicit_sum(*a, **k, physical_batch_size=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mask", "sorted_and_put_back"])
def test_no_way_to_the_sum_lets_moved_rows_through(name: str, way: str) -> None:
    torch.manual_seed(0)
    net = Net(name).double()
    for kind in ("all of one", "uneven"):
        last = batch(kind)
        assert_exact_or_refused(
            lambda last=last: WAYS[way](net, batch("equal"), last, loss=loss_of, policy=Flat(0.5)), net, last
        )


@pytest.mark.parametrize("name", ["mask", "taken_apart_and_stacked", "copied_into_a_buffer"])
def test_where_the_rows_lie_as_in_the_check_the_batch_is_trained_on_with_a_warning(name: str) -> None:
    net, last = Net(name).double(), batch("equal")
    with pytest.warns(UserWarning, match=r"rows were moved along the batch at .*test_whose_rows\.py, line"):
        found = explicit_sum(net, last, last, loss=loss_of, policy=Flat(0.5))
    assert_exact(found, reference(net, last, loss_of, Flat(0.5)))


def test_a_refused_batch_teaches_nothing() -> None:
    """The next batch, whose shapes are those of the refused one, is refused as well."""
    torch.manual_seed(0)
    net = Net("mask").double()

    def loss(m: nn.Module, b: Any) -> Tensor:
        return loss_of(m, b)

    for kind in ("uneven", "all of one"):
        with quiet(), pytest.raises(PrivetError, match="which rows"):
            explicit_sum(net, batch("equal"), batch(kind), loss=loss, policy=Flat(0.5))


# -- harmless moves ----------------------------------------------------------------------------------------------------


class Harmless(nn.Module):
    """Moves along positions and features of batches padded to other lengths; takes one position of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.token = nn.Embedding(9, D), nn.Parameter(torch.randn(1, 1, D))
        self.mix, self.cell, self.last = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(2 * D, 2)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T)
        h = torch.cat([self.token.expand(len(ids), -1, -1), self.table(ids)], dim=1)
        q, k, v = self.mix(h).chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k.roll(1, 1), v)[:, 1:].flip(1)
        states = [torch.tanh(self.cell(h[:, t])) for t in range(h.shape[1])]
        h = torch.stack(states, dim=1)
        end = h[torch.arange(len(ids)), ids.argmax(-1)]
        best = h.gather(1, ids.argmax(-1)[:, None, None].expand(-1, 1, D))[:, 0]
        out = torch.zeros_like(h)
        out[:, ::2] = h[:, ::2]
        top = out.topk(1, dim=1).values[:, 0]
        return self.last(torch.cat([end + best, top], dim=-1))


@pytest.mark.parametrize("door", DOORS)
def test_moves_along_other_axes_are_no_reason_to_look_again(door: str) -> None:
    torch.manual_seed(0)
    net = Harmless().double()

    def squares(m: nn.Module, b: Any) -> Tensor:
        return m(*b).square().sum(1)

    ids = [(torch.randint(9, (n, t)),) for n, t in ((4, 4), (3, 6), (1, 5), (5, 5), (4, 3))]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rows were moved along the batch")
        found = door_sum(door, net, *ids, loss=squares, policy=Flat(0.5))
    assert_exact(found, reference(net, ids[-1], squares, Flat(0.5)))
