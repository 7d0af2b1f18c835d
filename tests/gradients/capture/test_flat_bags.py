"""Bags that lie in one row, cut by offsets: exact at both doors, for the check moves whole bags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet.batches.flat import Bags, as_given, is_rearranged, rearranged_bags
from privet.clipping import Flat
from privet.errors import PrivetError
from privet.gradients.capture import coverage
from privet.gradients.reference import example_gradients
from tests.contracts.doors import DOORS, Expected, door_sum, expected_sum, size

ENTRIES = 9
pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")
Batch = tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


class Recommender(nn.Module):
    """Dense features beside several tables of flat bags."""

    def __init__(self, mode: str = "sum", *, last: bool = False) -> None:
        super().__init__()
        bags = [nn.EmbeddingBag(ENTRIES, 4, mode=mode, include_last_offset=last) for _ in range(2)]
        self.tables, self.dense, self.top = nn.ModuleList(bags), nn.Linear(3, 4), nn.Linear(12, 2)

    def forward(self, dense: Tensor, ids: list[Tensor], offsets: list[Tensor], weights: list[Any]) -> Tensor:
        found = [table(*flat) for table, *flat in zip(self.tables, ids, offsets, weights, strict=True)]
        return self.top(torch.cat([self.dense(dense).relu(), *found], 1))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch).square().sum(1)


def offsets_of(lengths: Tensor, *, last: bool) -> Tensor:
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return offsets if last else offsets[:-1]


def batch_of(lengths: list[Tensor], *, last: bool = False, weighted: bool = False) -> Batch:
    ids = [torch.randint(ENTRIES, (int(each.sum()),)) for each in lengths]
    weights = [torch.randn(len(row), dtype=torch.float64) if weighted else None for row in ids]
    dense = torch.randn(len(lengths[0]), 3, dtype=torch.float64)
    return dense, ids, [offsets_of(each, last=last) for each in lengths], weights


def part(batch: Batch, lengths: list[Tensor], start: int, stop: int, *, last: bool = False) -> Batch:
    dense, ids, _, weights = batch
    places = [slice(int(each[:start].sum()), int(each[:stop].sum())) for each in lengths]
    offsets = [offsets_of(each[start:stop], last=last) for each in lengths]
    own = [None if w is None else w[place] for w, place in zip(weights, places, strict=True)]
    return dense[start:stop], [row[place] for row, place in zip(ids, places, strict=True)], offsets, own


def reference(module: nn.Module, batch: Batch, lengths: list[Tensor], *, last: bool) -> Expected:
    rows = [part(batch, lengths, i, i + 1, last=last) for i in range(len(batch[0]))]
    return expected_sum(example_gradients(module, rows, lambda m, b: loss(m, b).sum()), Flat(1.0))


FORMS = [("sum", False), ("sum", True), ("mean", False), ("max", False)]


@pytest.mark.parametrize("last", [False, True], ids=["offsets of B", "last offset"])
@pytest.mark.parametrize(("mode", "weighted"), FORMS)
@pytest.mark.parametrize("door", DOORS)
def test_both_doors_take_one_example_at_a_time(door: str, mode: str, weighted: bool, last: bool) -> None:
    module = Recommender(mode, last=last).double()
    lengths = [torch.tensor([0, 2, 1, 3, 0]), torch.tensor([1, 1, 1, 1, 1])]  # empty bags; as many ids as examples
    more = [torch.randint(0, 4, (20,)), torch.randint(0, 4, (20,))]  # more than a check looks at
    batches = [batch_of(each, last=last, weighted=weighted) for each in (more, lengths)]
    expected = reference(module, batches[-1], lengths, last=last)
    found = door_sum(door, module, *batches, loss=loss)
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-11 * expected.terms, name


@pytest.mark.parametrize("door", DOORS)
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(door: str) -> None:
    lengths = [torch.tensor([2, 0, 1, 3]), torch.tensor([1, 2, 1, 2])]
    module, batch = Recommender().double(), batch_of(lengths)
    without = door_sum(door, module, part(batch, lengths, 0, 3), loss=loss)
    for scale in (1.0, 1000.0):
        changed = (torch.cat([batch[0][:3], scale * batch[0][3:]]), *batch[1:])
        more = door_sum(door, module, changed, loss=loss)
        assert 0.5 < size({name: more[name] - without[name] for name in more}) <= 1.0 + 1e-9


@pytest.mark.parametrize("door", DOORS)
def test_an_empty_batch_is_a_step_of_nothing(door: str) -> None:
    lengths = [torch.tensor([2, 0, 1]), torch.tensor([1, 2, 1])]
    batch = batch_of(lengths)
    empty = (batch[0][:0], [ids[:0] for ids in batch[1]], [offsets[:0] for offsets in batch[2]], batch[3])
    assert all(not v.any() for v in door_sum(door, Recommender().double(), batch, empty, loss=loss).values())


@pytest.mark.parametrize("door", DOORS)
def test_offsets_that_are_moved_alone_are_refused(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "rearranged_bags", lambda *_, **__: None)
    with pytest.raises((PrivetError, RuntimeError)):
        door_sum(door, Recommender().double(), batch_of([torch.tensor([2, 1, 1, 3])] * 2), loss=loss)


# -- the rearranged inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
def test_rows_are_put_together_as_they_were(last: bool) -> None:
    lengths = torch.tensor([2, 0, 3, 1])
    ids, offsets, weights = torch.arange(6), offsets_of(lengths, last=last), torch.randn(6)
    inputs = {"ids": ids, "rest": [offsets, weights], "other": torch.arange(6)}
    apart = rearranged_bags(inputs, inputs, [Bags(ids, offsets, weights, last)], examples=4)
    assert is_rearranged(apart)
    assert not is_rearranged(inputs)
    assert apart["other"] is inputs["other"], "a tensor of the same size is not taken for ids"
    again = as_given(apart)
    assert torch.equal(again["ids"], ids)
    assert all(map(torch.equal, again["rest"], (offsets, weights)))


@pytest.mark.parametrize(
    "offsets", [torch.tensor([1, 2, 3]), torch.tensor([0, 3, 2]), torch.tensor([0, 2])], ids=["late", "falling", "few"]
)
def test_offsets_that_do_not_cut_one_bag_for_each_example_are_left_alone(offsets: Tensor) -> None:
    ids = torch.arange(4)
    assert rearranged_bags([ids, offsets], [ids, offsets], [Bags(ids, offsets, None, False)], examples=3) is None
