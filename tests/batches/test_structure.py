"""Which values are containers, what they are made of, and what is refused with a path and a remedy."""

from __future__ import annotations

import dataclasses
import enum
from collections import UserDict, UserList, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from privet.batches.count import count_examples
from privet.batches.cut import cut_like, cut_rows
from privet.batches.empty import UnknownLeafError, emptied
from privet.batches.grow import grown, left_out, refuse_read_once
from privet.batches.structure import Arguments, context_of, is_container, rebuilt, steps_to
from privet.batches.tree import is_column, is_plain, leaves_in, mapped, paths_in
from privet.errors import ConfigurationError, UnsupportedModelError
from privet.gradients.passes.compiled.situation import form_of
from tests.batches.containers import Counting, Encoding, Output, Pair, Registered

X = torch.ones(4, 2)


class Color(enum.Enum):
    RED = 1


class Closed:
    """A class that nobody registered."""


class Stubborn(UserDict[str, Any]):
    """A mapping whose class wants something else."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__({"first": first, "second": second})


class Rounding(UserDict[str, Any]):
    """A mapping that changes what it is given."""

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value.round()


@dataclasses.dataclass
class Fussy:
    x: Tensor

    def __post_init__(self) -> None:
        if not len(self.x):
            raise ValueError("no examples")


class Sized:
    """A registered class whose context counts examples."""

    def __init__(self, x: Tensor, count: int) -> None:
        self.x, self.count = x, count


register_pytree_node(Sized, lambda s: ([s.x], s.count), lambda parts, count: Sized(*parts, count))


@pytest.mark.parametrize(
    "leaf",
    [X, np.ones(3), torch.Size([2, 3]), "text", b"b", 3, 2.5, None, True, Color.RED, Closed(), Pair, Counting, {1, 2},
     iter([1]), range(3), torch.float32, UserList([X])],
    ids=lambda leaf: type(leaf).__name__,
)  # fmt: skip
def test_leaves(leaf: Any) -> None:
    assert not is_container(leaf)
    assert list(leaves_in([leaf, leaf])) == ([[leaf, leaf]] if is_plain(leaf) else [leaf, leaf])


def test_columns_are_lists_of_plain_values_and_no_records() -> None:
    for column in (["a", "b"], [1, 2.5, None], (), [], deque([1]), ("a",), [Color.RED], [np.float32(1.0)]):
        assert is_column(column)
    for other in ([X], ["a", X], torch.Size([1]), Pair("a", "b"), Arguments((1,), {}), {"a": 1}, "ab", [["a"]]):
        assert not is_column(other)


def test_paths_read_as_code() -> None:
    batch = {"a": [X, Pair(X, [1])], 3: Output(x=X), "r": Registered(X, Closed(), "r")}
    assert [path for path, _ in paths_in(batch, "b")] == [
        "b['a'][0]", "b['a'][1].x", "b['a'][1].y", "b[3]['x']", "b['r']['x']", "b['r']['y']",
    ]  # fmt: skip
    assert steps_to(Arguments((X, X), {"mask": X})) == ["[0]", "[1]", "['mask']"]


def test_a_container_in_which_nothing_changes_is_itself() -> None:
    stubborn = Stubborn(X, 1)
    batch = {"x": torch.zeros(3), "other": stubborn}
    found = grown(batch, examples=3, axis=0)
    assert len(found["x"]) == 4
    assert found["other"] is stubborn
    assert mapped(batch, lambda leaf, path: leaf, "b") is batch


def test_what_a_class_keeps_beside_its_parts_goes_with_it_only_if_it_was_registered() -> None:
    encoding = Encoding({"x": X}, encoding="all tokens of all examples")
    assert cut_rows(encoding, 0, 1, examples=4)._encodings is None
    registered = cut_rows(Registered(X, X, "mine"), 0, 1, examples=4)
    assert registered.name == "mine"
    assert context_of(registered) == "mine"
    assert context_of(encoding) is context_of((1,)) is None


def test_what_a_dataclass_was_given_later_is_cut_as_well() -> None:
    @dataclasses.dataclass
    class Late:
        x: Tensor
        extra: Tensor | None = dataclasses.field(init=False, default=None)

    late = Late(X)
    late.extra = torch.arange(4)
    assert cut_rows(late, 1, 3, examples=4).extra.tolist() == [1, 2]


def test_a_dataclass_works_out_its_own_fields_again() -> None:
    found = cut_rows(Counting(X, X[:, 0]), 1, 3, examples=4)
    assert found.count == 2
    assert torch.equal(found.doubled, 2 * X[1:3])


# -- refusals ----------------------------------------------------------------------------------------------------------

WHAT_TO_DO = r"register the class with torch\.utils\._pytree\.register_pytree_node"


@pytest.mark.parametrize("odd", [Closed(), {"a", "b"}, range(4), UserList([X])], ids=lambda odd: type(odd).__name__)
def test_what_cannot_be_cut_is_named_with_path_type_and_remedy(odd: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"the batch\['odd'\]\[0\] is an? {type(odd).__name__}.*{WHAT_TO_DO}"):
        cut_rows({"x": X, "odd": [odd]}, 0, 1, examples=4)


def test_a_generator_is_read_by_nobody() -> None:
    def rows() -> Iterator[int]:
        yield from range(4)

    lazy = rows()
    with pytest.raises(ConfigurationError, match=rf"the batch\[1\] is a generator.*make it a list.*{WHAT_TO_DO}"):
        cut_rows((X, lazy), 0, 1, examples=4)
    with pytest.raises(ConfigurationError, match=r"the inputs\[0\]\['rows'\] is a generator.*more than once"):
        refuse_read_once(Arguments(({"rows": lazy},), {}))
    assert next(lazy) == 0


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (Closed(), "the batch is a Closed"),
        ({"a": Closed(), "n": 3}, r"the batch\['a'\] is a Closed; the batch\['n'\] is an int"),
        (torch.tensor(1.0), r"the batch is a Tensor of shape \(\)"),
        ((2, 3), "the batch is a tuple of 2 values"),
        ([[], Closed()], r"the batch\[1\] is a Closed"),
        ({}, "the batch is empty"),
    ],
)
def test_an_object_without_examples_is_named_with_path_and_type(batch: Any, found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"cannot be counted.*{found}.*{WHAT_TO_DO}"):
        count_examples(batch)


def test_what_counts_examples() -> None:
    assert count_examples(["a", "b", "c"]) == 3
    assert count_examples({"names": ["a", "b"], "x": torch.ones(5, 1)}) == 5, "tensors come first"
    assert count_examples([["a", "b"], np.ones((7, 2))]) == 7, "then arrays"
    assert count_examples((torch.tensor(1.0), X)) == 4
    assert count_examples((torch.ones(4), torch.ones(3, 8)), 1) == 8
    assert count_examples({"names": [], "tags": []}) == 0
    assert count_examples(torch.ones(0, 3)) == 0


@pytest.mark.parametrize(
    ("kind", "reason"), [(Stubborn(X, X), "TypeError"), (Rounding(a=X), "does not keep")], ids=["arguments", "values"]
)
def test_a_class_that_cannot_be_built_again_is_named(kind: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"the batch\[0\] is a {type(kind).__name__}.*{reason}.*{WHAT_TO_DO}"):
        cut_rows([kind], 0, 1, examples=4)


def test_a_class_that_wants_examples_cannot_be_emptied() -> None:
    with pytest.raises(UnknownLeafError, match=r"the batch\['f'\], a Fussy that cannot be built of no examples"):
        emptied({"f": Fussy(torch.zeros(1))}, {"f": Fussy(torch.zeros(2))})


def test_a_context_that_counts_examples_is_not_believed() -> None:
    with pytest.raises(UnknownLeafError, match="a Sized whose registered context depends on the examples"):
        emptied(Sized(torch.zeros(1), 1), Sized(torch.zeros(2), 2))
    with pytest.raises(ConfigurationError, match=r"the batch is a Sized.*registered context depends"):
        cut_like(Sized(torch.zeros(1), 1), Sized(torch.zeros(2), 2), Sized(torch.zeros(5), 5), 0, 2)


def test_what_may_hold_examples_and_is_not_seen_to_is_told() -> None:
    inputs = Arguments((X, Closed(), (1, 2, 3, 4), (1, 2)), {"names": ["a"] * 4})
    assert left_out(inputs, 4) == ["the inputs[1] is a Closed", "the inputs[2] is a tuple of 4 values"]


def test_rebuilding_needs_the_parts_of_the_class() -> None:
    with pytest.raises(ConfigurationError, match="cannot be built again"):
        rebuilt(Pair(X, X), [X])


def test_a_graph_holds_for_one_context_of_a_registered_class() -> None:
    assert form_of(Registered(X, X, "a")) == form_of(Registered(2 * X, X, "a"))
    assert form_of(Registered(X, X, "a")) != form_of(Registered(X, X, "b"))
    with pytest.raises(ConfigurationError, match="the context of the batch is of type Closed"):
        form_of(Registered(X, X, Closed()))  # type: ignore[arg-type]
