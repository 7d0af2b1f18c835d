"""Empty batches: the structure of any other batch, whatever the collate function makes."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from privet.errors import ConfigurationError
from privet.sampling.empty import EmptyBatch

Pair = namedtuple("Pair", ["image", "label"])  # noqa: PYI024 - what users have
IMAGE = torch.full((3, 8, 8), 7.0)


@dataclass
class Record:
    tokens: torch.Tensor
    names: list[str]


@dataclass(frozen=True)
class FrozenRecord:
    tokens: torch.Tensor


class Encoding(UserDict):
    """A mapping of a library's own."""


def empty(example, collate_fn=default_collate):
    return EmptyBatch([example], collate_fn).make()


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape
    return one == two


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (IMAGE, torch.empty(0, 3, 8, 8)),
        (IMAGE.half(), torch.empty(0, 3, 8, 8, dtype=torch.float16)),
        (torch.tensor(3), torch.empty(0, dtype=torch.int64)),
        (torch.empty(0), torch.empty(0, 0)),
        (2.5, torch.empty(0, dtype=torch.float64)),
        (7, torch.empty(0, dtype=torch.int64)),
        (True, torch.empty(0, dtype=torch.bool)),
        (np.zeros((4, 2), np.float32), torch.empty(0, 4, 2)),
        ("a word", []),
        (b"bytes", []),
    ],
)
def test_leaves(example, expected):
    found = empty(example)
    assert type(found) is type(expected)
    assert same(found, expected)


def test_a_tuple_becomes_what_torch_makes_of_it():
    image, label = empty((IMAGE, 3))
    assert same(image, torch.empty(0, 3, 8, 8))
    assert same(label, torch.empty(0, dtype=torch.int64))
    assert type(empty((IMAGE, 3))) is type(default_collate([(IMAGE, 3)]))


def test_a_namedtuple_keeps_its_type():
    batch = empty(Pair(IMAGE, 3))
    assert type(batch) is Pair
    assert same(batch.image, torch.empty(0, 3, 8, 8))


@pytest.mark.parametrize("kind", [dict, OrderedDict, Encoding])
def test_a_mapping_keeps_its_type_and_order(kind):
    batch = empty(kind(text="one", ids=torch.arange(5), meta={"weight": 0.5, "tags": ("a", "b")}))
    assert type(batch) is type(default_collate([kind(text="one")]))
    assert list(batch) == ["text", "ids", "meta"]
    assert batch["text"] == []
    assert same(batch["ids"], torch.empty(0, 5, dtype=torch.int64))
    assert same(batch["meta"]["weight"], torch.empty(0, dtype=torch.float64))
    assert list(batch["meta"]["tags"]) == [(), ()]  # torch makes tuples of columns of strings


@pytest.mark.parametrize("kind", [OrderedDict, Encoding])
def test_a_collate_function_may_return_mappings_of_its_own(kind):
    batch = empty(IMAGE, lambda examples: kind(pixels=torch.stack(examples)))
    assert type(batch) is kind
    assert same(batch["pixels"], torch.empty(0, 3, 8, 8))


def test_dataclasses():
    batch = empty(IMAGE, lambda examples: Record(torch.stack(examples), ["name"] * len(examples)))
    assert type(batch) is Record
    assert same(batch.tokens, torch.empty(0, 3, 8, 8))
    assert batch.names == []
    assert same(empty(IMAGE, lambda e: FrozenRecord(torch.stack(e))).tokens, torch.empty(0, 3, 8, 8))


def test_numpy_batches():
    found = empty(np.ones(3), np.stack)
    assert same(found, np.empty((0, 3)))


def test_a_list_of_examples():
    assert empty(IMAGE, list) == []
    assert empty(IMAGE, tuple) == ()


def test_the_batch_axis_may_stand_anywhere():
    assert same(empty(torch.ones(9, 2), lambda e: torch.stack(e, dim=1)), torch.empty(9, 0, 2))


def test_examples_may_be_laid_end_to_end():
    assert same(empty(torch.ones(9, 2), torch.cat), torch.empty(0, 2))
    assert same(empty(torch.ones(4), lambda e: torch.block_diag(*[x[None] for x in e])), torch.empty(0, 0))


def test_what_does_not_count_examples_keeps_its_shape_but_no_content():
    def collate(e):
        return {"x": torch.stack(e), "scale": torch.tensor(3.5), "longest": 8, "count": len(e), "kind": "train"}

    batch = empty(IMAGE, collate)
    assert same(batch["scale"], torch.tensor(0.0))
    assert batch["scale"] == 0
    assert (batch["longest"], batch["count"], batch["kind"]) == (8, 0, "train")


def test_what_cannot_be_cut_is_asked_of_the_collate_function():
    class Graph:
        def __init__(self, size):
            self.size = size

    assert empty(IMAGE, lambda e: Graph(len(e))).size == 0

    def fussy(examples):
        if not examples:
            raise IndexError("no examples")
        return {"graph": Graph(len(examples))}

    with pytest.raises(ConfigurationError, match=r"\['graph'\], a Graph,.*IndexError: no examples"):
        empty(IMAGE, fussy)
    with pytest.raises(ConfigurationError, match="of shape"):
        empty(IMAGE, lambda e: torch.ones(3 * len(e) ** 2) if e else fussy(e))
    with pytest.raises(ConfigurationError, match="varying length"):
        empty(IMAGE, lambda e: {str(n): x for n, x in enumerate(e)} if e else fussy(e))


def test_a_dataset_that_fails_says_where():
    with pytest.raises(ConfigurationError, match=r"first example.*IndexError"):
        EmptyBatch([], default_collate).make()


def test_every_empty_batch_is_a_new_one():
    maker = EmptyBatch([{"x": IMAGE, "names": "a"}], default_collate)
    one, two = maker.make(), maker.make()
    one["names"].append("mine")
    one["y"] = 1
    assert two["names"] == []
    assert "y" not in maker.make()


def test_an_augmentation_does_not_notice():
    class Augmented:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return torch.rand(3) + random.random() + np.random.rand()  # noqa: NPY002 - what users write

    def rolls():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        yield
        yield torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    plain = list(rolls())[1]
    asked = rolls()
    next(asked)
    EmptyBatch(Augmented(), default_collate).make()
    assert next(asked) == plain


def test_no_content_of_the_example_is_kept():
    maker = EmptyBatch([{"x": IMAGE, "a": 2.5}], default_collate)
    maker.make()
    assert all(not leaf.any() for collated in maker._pair for leaf in collated.values())
