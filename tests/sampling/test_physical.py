"""Physical batches: what is cut where, which errors mean that memory ran out, and how sizes are halved."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from privet.errors import ConfigurationError, OutOfMemoryError
from privet.noise import NoiseKey
from privet.sampling import BatchTicket, privatize_loader
from privet.sampling.empty import EmptyBatch
from privet.sampling.physical import PhysicalSize, cut_like, cut_rows, tickets_of

# -- cutting -----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: torch.Tensor
    name: list[str]


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: Any


def collated(kind: str, rows: list[int]) -> Any:
    """Returns a batch of examples, each of which is a number, as some collate function would make it."""
    x = torch.tensor([[float(r)] * 3 for r in rows])
    return {
        "tensor": x,
        "second axis": x.T.contiguous(),
        "flattened": x.flatten(),
        "tuple": (x, x[:, 0].numpy()),
        "dict": {"x": x, "names": [str(r) for r in rows], "n": len(rows), "kind": "train", "weights": torch.ones(4)},
        "namedtuple": Pair(x, [str(r) for r in rows]),
        "dataclass": Record(x, {"ragged": [torch.zeros(r + 1) for r in rows]}),
    }[kind]


KINDS = ["tensor", "second axis", "flattened", "tuple", "dict", "namedtuple", "dataclass"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 9), data=st.data())
def test_a_cut_batch_is_the_batch_of_its_examples(kind: str, size: int, data: Any) -> None:
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    one, two = EmptyBatch(list(range(size)), lambda rows: collated(kind, rows)).structures()
    rows = list(range(10, 10 + size))
    assert same(cut_like(one, two, collated(kind, rows), start, stop), collated(kind, rows[start:stop]))


def test_a_batch_that_is_built_otherwise_is_refused() -> None:
    one, two = collated("dict", [1]), collated("dict", [1, 1])
    for batch in (collated("tuple", [1, 2]), {"x": torch.ones(2, 3)}, {**collated("dict", [1, 2]), "kind": 7}):
        with pytest.raises(ConfigurationError, match="build all batches alike"):
            cut_like(one, two, batch, 0, 1)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "namedtuple"])
def test_rows_are_cut_along_axis_0(kind: str) -> None:
    found = cut_rows(collated(kind, [1, 2, 3, 4, 5]), 1, 3, examples=5)
    expected = collated(kind, [2, 3])
    assert same(found, expected)
    assert type(found) is type(expected)


def test_values_without_rows_are_handed_on() -> None:
    batch = {"x": torch.ones(4, 2), "scale": torch.tensor(2.0), "split": "train", "n": 4, "none": None}
    found = cut_rows(batch, 0, 1, examples=4)
    assert len(found["x"]) == 1
    assert {k: found[k] for k in ("scale", "split", "n", "none")} == {
        k: batch[k] for k in ("scale", "split", "n", "none")
    }


@pytest.mark.parametrize("odd", [torch.ones(3), np.ones((5, 4)), ["a"], [torch.ones(2), torch.ones(4)], ()])
def test_what_may_hold_examples_elsewhere_is_refused(odd: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"the batch\['odd'\].*cut into physical ones"):
        cut_rows({"x": torch.ones(4, 2), "odd": odd}, 0, 1, examples=4)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), most=st.integers(1, 45), first=st.booleans(), last=st.booleans())
def test_tickets_of_parts_add_up(size: int, most: int, first: bool, last: bool) -> None:
    whole = BatchTicket(step=3, index=2, passes=1, size=size, first=first, last=last)
    parts = list(tickets_of(whole, most))
    assert [stop - start for start, stop, _ in parts] == [ticket.size for *_, ticket in parts]
    assert sum(ticket.size for *_, ticket in parts) == size
    assert max(ticket.size for *_, ticket in parts) <= most
    assert [ticket.first for *_, ticket in parts] == [first] + [False] * (len(parts) - 1)
    assert [ticket.last for *_, ticket in parts] == [False] * (len(parts) - 1) + [last]
    assert {(ticket.step, ticket.index, ticket.passes) for *_, ticket in parts} == {(3, 2, 1)}


# -- drawing in parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_parts_are_the_batches_cut(poisson: bool, workers: int) -> None:
    def loader(count: int) -> Any:
        data = DataLoader(TensorDataset(torch.arange(30)), batch_size=7, num_workers=count)
        key = NoiseKey.from_generator(torch.Generator().manual_seed(0))
        return privatize_loader(data, poisson=poisson, key=key)

    whole = [batch.tolist() for (batch,) in loader(0)]
    cut = loader(workers)
    parts = [(ticket, batch[0].tolist()) for ticket, batch in cut.drawn(lambda: 3)]
    joined: list[list[int]] = []
    for ticket, rows in parts:
        assert ticket.size == len(rows) <= 3
        if ticket.first:
            joined.append([])
        joined[-1] += rows
        assert ticket.last == (joined[-1] == whole[ticket.index])
    assert joined == whole


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_halved_down_to_one() -> None:
    size, error = PhysicalSize("size", "auto"), MemoryError("full")
    assert size.most is None
    for failed, expected in ((11, 5), (5, 2), (2, 1)):
        size.halve(failed, error)
        assert size.most == expected
    with pytest.raises(OutOfMemoryError, match="of 1, after 11, 5, 2, 1 were tried") as caught:
        size.halve(1, error)
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("given", [0, -3, 2.0, "many", True, float("nan")])
def test_sizes_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="size must be a whole number of at least 1"):
        PhysicalSize("size", given)
