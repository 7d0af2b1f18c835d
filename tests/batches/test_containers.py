"""Every operation on the examples of a batch, for every container of the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from privet.batches.count import count_examples
from privet.batches.cut import cut_like, cut_rows, first_examples, without_examples
from privet.batches.empty import emptied, hollow
from privet.batches.fill import fill_rows
from privet.batches.grow import detached, grown, one_of_zeros
from privet.batches.replace import nearest, rearranged
from privet.batches.structure import Arguments
from privet.batches.tree import paths_in, taken_apart, tensors_in
from privet.errors import ConfigurationError
from tests.batches.containers import FORMS, T, examples_of, same

B = 6
X, Y = examples_of(B)
EACH = pytest.mark.parametrize("form", FORMS)


def made(form: str, x: Tensor = X, y: Tensor = Y) -> Any:
    return FORMS[form].make(x.clone(), y.clone())


def structures(form: str) -> tuple[Any, Any]:
    return hollow(made(form, X[:1], Y[:1])), hollow(made(form, X[[0, 0]], Y[[0, 0]]))


@EACH
def test_examples_are_counted(form: str) -> None:
    for count in (1, 4, B):
        batch = made(form, X[:count], Y[:count])
        assert count_examples(batch) == count
        assert count_examples(Arguments((batch,), {})) == count
        assert count_examples(Arguments((), {"other": 3, "batch": batch})) == count
    assert count_examples(emptied(*structures(form))) == 0


@EACH
@pytest.mark.parametrize(("start", "stop"), [(0, B), (0, 1), (1, 4), (5, 6)])
def test_a_part_is_the_batch_of_its_examples(form: str, start: int, stop: int) -> None:
    expected = made(form, X[start:stop], Y[start:stop])
    assert same(cut_rows(made(form), start, stop, examples=B), expected)
    assert same(cut_like(*structures(form), made(form), start, stop), expected)


@EACH
def test_the_first_examples_are_found_among_the_inputs(form: str) -> None:
    found = first_examples(Arguments((made(form), tuple(range(B))), {"mask": X[:4]}), 2, examples=B, axis=0)
    assert same(found.args[0], made(form, X[:2], Y[:2]))
    assert found.args[1] == tuple(range(B)), "a tuple of numbers is a shape"
    assert torch.equal(found.kwargs["mask"], X[:4])


@EACH
def test_one_more_example_is_a_copy_of_the_last(form: str) -> None:
    found = grown(made(form), examples=B, axis=0)
    assert same(found, made(form, torch.cat([X, X[-1:]]), torch.cat([Y, Y[-1:]])))


@EACH
def test_examples_take_the_places_of_others(form: str) -> None:
    sources = nearest([True, False, False, True, True, False][:B])
    assert sources == [1, 1, 2, 2, 5, 5][:B]
    order = torch.tensor(sources)
    assert same(rearranged(made(form), sources, examples=B, axis=0), made(form, X[order], Y[order]))


@EACH
def test_zeros_fill_a_batch_up(form: str) -> None:
    if not FORMS[form].fills:
        with pytest.raises(ConfigurationError, match=r"the batch\['names'\] is a list of 6 values"):
            fill_rows(made(form), B + 2, examples=B)
        return
    expected = made(form, torch.cat([X, X.new_zeros(2, T)]), torch.cat([Y, Y.new_zeros(2)]))
    assert same(fill_rows(made(form), B + 2, examples=B), expected)


@EACH
def test_an_empty_batch_is_cut_to_nothing(form: str) -> None:
    found = emptied(*structures(form))
    expected = made(form, X[:0], Y[:0])
    if form == "dict":
        expected["scale"] = torch.tensor(0.0)
    assert same(found, expected)
    assert found is not emptied(*structures(form))


@EACH
def test_one_example_of_zeros_takes_the_place_of_none(form: str) -> None:
    found = one_of_zeros(emptied(*structures(form)), axis=0)
    assert count_examples(found) == 1
    assert FORMS[form].x_of(found).tolist() == [[0.0] * T]
    assert FORMS[form].y_of(found).tolist() == [0]


@EACH
def test_an_output_for_one_example_becomes_one_for_none(form: str) -> None:
    found = without_examples(made(form, X[:1], Y[:1]), 0)
    assert type(found) is type(made(form))
    assert sum(t.numel() for t in tensors_in(found) if t.dim()) == 0


@EACH
def test_tensors_are_found_and_others_put_in_their_place(form: str) -> None:
    tensors, put = taken_apart(made(form), lambda leaf: isinstance(leaf, Tensor))
    again = put([t.clone() for t in tensors])
    assert same(again, made(form))
    assert len(tensors_in(made(form))) >= len(tensors)
    assert [leaf for _, leaf in paths_in(again, "b") if isinstance(leaf, Tensor)] == taken_apart(
        again, lambda leaf: isinstance(leaf, Tensor)
    )[0]


@EACH
def test_a_batch_without_a_graph_holds_the_same(form: str) -> None:
    if form == "arrays":
        return
    batch = FORMS[form].make(X.clone().requires_grad_(), Y)
    assert any(t.requires_grad for t in tensors_in(batch))
    found = detached(batch)
    assert not any(t.requires_grad for t in tensors_in(found))
    assert same(found, made(form))


@EACH
def test_leaves_that_disagree_are_named_by_their_paths(form: str) -> None:
    key = FORMS[form].key
    if key is None:
        return
    batch = FORMS[form].make(X, Y[:3])
    with pytest.raises(ConfigurationError) as caught:
        cut_rows(batch, 0, 2, examples=count_examples(batch))
    message = str(caught.value)
    assert f"the batch{key} is a Tensor of shape (3,), and the batch" in message
    assert "(6, 5)" in message or "6 sequences" in message
    assert "disagree about the number of examples" in message


@EACH
def test_nothing_changes_the_batch_it_was_given(form: str) -> None:
    batch = made(form)
    grown(batch, examples=B, axis=0)
    rearranged(batch, [0] * B, examples=B, axis=0, factors=[2.0] * B)
    cut_rows(batch, 1, 3, examples=B)
    if FORMS[form].fills:
        fill_rows(batch, 9, examples=B)
    without_examples(batch, 0)
    hollow(batch)
    assert same(batch, made(form))
