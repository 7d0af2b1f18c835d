"""Programs of moves put together at random: their sum is that of one example at a time, or the batch is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privet import Flat
from privet.errors import PrivetError
from privet.gradients.reference import example_gradients
from tests.contracts.doors import assert_exact, expected_sum, explicit_sum, paper_sum

D = 3
_Move = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


# Each takes rows (R, D), their owners (R,) and the lengths of the examples (B,), and returns rows and owners.


def by_length(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    order = lengths[owner].argsort(stable=True, descending=True)
    return rows[order], owner[order]


def repeated(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return rows.repeat_interleave(lengths[owner], 0), owner.repeat_interleave(lengths[owner], 0)


def doubled(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([rows, rows.flip(1)]), torch.cat([owner, owner])


def turned(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    by = int(lengths[0]) - 1
    return rows.roll(by, 0), owner.roll(by, 0)


def joined_again(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    where = int(lengths[-1])
    return torch.cat([rows[where:], rows[:where]]), torch.cat([owner[where:], owner[:where]])


def selected(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    places = (lengths[owner] > 1).nonzero()[:, 0]
    return rows.index_select(0, places), owner[places]


def copied(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    buffer = rows.new_zeros(len(rows), D)
    buffer[:] = rows
    return buffer, owner


def through_a_layer(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return net.inner(rows).tanh(), owner


def as_they_are(net: Any, rows: Tensor, owner: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return rows * 2.0, owner


MOVES: tuple[_Move, ...] = (
    *(by_length, repeated, doubled, turned, joined_again, selected, copied, through_a_layer, as_they_are),
)


class Program(nn.Module):
    def __init__(self, moves: list[_Move]) -> None:
        super().__init__()
        self.first, self.inner, self.last, self.moves = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2), moves

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # (B, D), (B,)
        rows, owner = self.first(x), torch.arange(len(x))
        for move in self.moves:
            rows, owner = move(self, rows, owner, lengths)
        return x.new_zeros(len(x), 2).index_add(0, owner, self.last(rows).tanh())


def loss_of(m: nn.Module, b: Any) -> Tensor:
    return 10.0 * m(*b).square().sum(1)


def batch(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(lengths), D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, torch.tensor(lengths)


lengths_of = st.lists(st.integers(1, 3), min_size=2, max_size=5)


@settings(deadline=None, max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.sampled_from(MOVES), min_size=1, max_size=4), st.integers(2, 4), lengths_of, st.booleans())
def test_any_program_is_exact_or_refused(moves: list[_Move], first: int, lengths: list[int], paper: bool) -> None:
    torch.manual_seed(len(moves))
    net, last = Program(moves).double(), batch(lengths, 1)
    door = paper_sum if paper else explicit_sum
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="rows were moved along the batch")
            found = door(net, batch([2] * first, 0), last, loss=loss_of, policy=Flat(0.5))
    except PrivetError:
        return
    # `turned` and `joined_again` do otherwise with one example alone. So each loss is asked for among the others.
    picks = [(*last, i) for i in range(len(lengths))]
    rows = example_gradients(net, picks, lambda m, b: loss_of(m, b[:2])[b[2]])
    assert_exact(found, expected_sum(rows, Flat(0.5)))
