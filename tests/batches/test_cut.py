"""What is cut where: in batches of the private loader, and in batches of a user's own."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.batches.cut import cut_like, cut_rows
from privet.errors import ConfigurationError
from privet.sampling.empty import EmptyBatch


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
