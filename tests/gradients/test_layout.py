"""Where the examples are: told by two sizes of a batch, held to ever after, and never guessed in doubt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet import UnsupportedModelError
from privet.gradients.layout import DoubtError, Layout, Layouts, Site, Told
from privet.gradients.turned import Turned

small = st.integers(1, 6)
TOLD_BY_SIZES = [Layout.CONSTANT, Layout.ROWS, Layout.MERGED, Layout.SECOND, Layout.SECOND_MERGED]


def site(axes: int) -> Site:
    return Site(torch.add, ("weight",), 0, axes)


def shape_of(layout: Layout, b: int, t: int, d: int) -> tuple[int, ...]:
    return {
        Layout.ROWS: (b, t, d),
        Layout.MERGED: (b * t, d),
        Layout.SECOND: (t, b, d),
        Layout.SECOND_MERGED: (d, b * t, 2),
        Layout.CONSTANT: (t, d),
    }[layout]


def learned(layout: Layout, b: int, t: int, d: int) -> Layouts:
    layouts = Layouts()
    first, second = shape_of(layout, b, t, d), shape_of(layout, b + 1, t, d)
    tolds: tuple[Told | None, ...] = (None, None)
    for _ in range(3):
        traces = []
        for shape, n, told in zip((first, second), (b, b + 1), tolds, strict=True):
            s = site(len(shape))
            traces.append([(s, shape, layouts.guessed(s, torch.zeros(shape, requires_grad=True), n, told))])
        settled, *tolds = layouts.learn(traces[0], traces[1], b, b + 1)
        if settled:
            return layouts
    raise AssertionError("not settled")


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(TOLD_BY_SIZES), small, small, small, small)
def test_what_was_learned_from_one_batch_holds_for_every_other(
    layout: Layout, b: int, t: int, d: int, other: int
) -> None:
    layouts = learned(layout, b, t, d)
    shape = shape_of(layout, other, t, d)
    found = layouts.of(site(len(shape)), torch.zeros(shape), other)
    alone = {Layout.MERGED: Layout.ROWS, Layout.SECOND_MERGED: Layout.SECOND}
    assert found is (alone.get(layout, layout) if t == 1 else layout)


def test_layouts_that_sizes_do_not_tell_are_those_that_are_found_out_otherwise() -> None:
    assert set(Layout) - set(TOLD_BY_SIZES) == {Layout.ROUTED, Layout.TURNED, Layout.SECOND_TURNED}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("other", [1, 2, 5])
def test_an_order_that_was_found_out_holds_for_every_batch_unless_the_usual_one_was_seen_too(
    other: int, axis: int
) -> None:
    layout, order = (Layout.SECOND_MERGED, Layout.MERGED)[axis == 0], Turned(3, 1, axis)
    shape = shape_of(layout, other, 3, 7)
    t, where = torch.zeros(shape), site(len(shape))
    of_one, of_two = learned(layout, 1, 3, 7), learned(layout, 2, 3, 7)
    of_one.turn(where, order)  # one example lies in any order, so none was seen before
    assert of_one.of(where, t, other) == order
    of_two.turn(where, order)
    if other == 1:
        assert of_two.of(where, t, other) is layout
        return
    with pytest.raises(DoubtError, match="axis"):
        of_two.of(where, t, other)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([Layout.ROWS, Layout.MERGED, Layout.SECOND, Layout.SECOND_MERGED]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_examples_come_first_in_every_layout(layout: Layout, b: int, t: int, d: int) -> None:
    rows = torch.arange(b * t * d).view(b, t, d)
    merged, inside = rows.reshape(b * t, d), rows.transpose(0, 1).reshape(b * t, d)
    lying = {Layout.ROWS: rows, Layout.MERGED: merged, Layout.SECOND: rows.transpose(0, 1)}
    lying[Layout.SECOND_MERGED] = merged.t()
    assert torch.equal(layout.examples_first(lying[layout], b, batch_first=True), rows)
    if layout is Layout.MERGED:
        assert torch.equal(layout.examples_first(inside, b, batch_first=False), rows)
    if layout is Layout.SECOND_MERGED:
        assert torch.equal(layout.examples_first(inside.t(), b, batch_first=False), rows)


@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 4), (5, 5)), ((3, 7, 4), (3, 7, 5)), ((6, 2), (8, 2)), ((4, 2), (6, 2)), ((4, 3), (4, 7))],
)
def test_growth_that_no_layout_explains_is_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    layouts = Layouts()
    s = site(len(first))
    with pytest.raises(UnsupportedModelError, match="cannot tell which rows"):
        layouts.learn([(s, first, Layout.ROWS)], [(s, second, Layout.ROWS)], 4, 5)


def test_another_layout_than_the_first_batchs_is_refused() -> None:
    layouts = learned(Layout.ROWS, 4, 2, 3)
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        layouts.of(site(3), torch.zeros(6, 2, 3), 5)


def test_a_site_with_two_layouts_is_refused_only_where_they_coincide() -> None:
    layouts = learned(Layout.ROWS, 4, 2, 3)
    layouts.known[site(3)].add(Layout.SECOND)
    assert layouts.of(site(3), torch.zeros(5, 2, 3), 5) is Layout.ROWS
    assert layouts.of(site(3), torch.zeros(2, 5, 3), 5) is Layout.SECOND
    with pytest.raises(UnsupportedModelError, match="leaves it open"):
        layouts.of(site(3), torch.zeros(5, 5, 3), 5)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (10, 3, 1, 1), (3, 3)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_new_site_is_in_doubt_whatever_its_shape(shape: tuple[int, ...], grad: bool) -> None:
    layouts = learned(Layout.ROWS, 4, 2, 3)
    with pytest.raises(DoubtError, match="not met when a batch was last looked at"):
        layouts.of(Site(torch.mul, ("weight",), 0, len(shape)), torch.zeros(shape, requires_grad=grad), 5)


def test_what_was_told_of_one_forward_is_met_in_its_order() -> None:
    told, s, t = Told(), site(3), torch.zeros(5, 5, 3)
    told.add(s, (5, 5, 3), Layout.ROWS)
    told.add(s, (5, 5, 3), Layout.SECOND)
    for _ in range(2):
        told.begin()
        assert [told.next(s, t) for _ in range(3)] == [Layout.ROWS, Layout.SECOND, None]
    assert told.all(s, t) == {Layout.ROWS, Layout.SECOND}
    assert told.next(s, torch.zeros(5, 6, 3)) is None


def test_two_layouts_that_say_the_same_of_a_tensor_leave_nothing_open() -> None:
    layouts = learned(Layout.MERGED, 4, 2, 3)
    layouts.known[site(2)].add(Layout.ROWS)
    assert layouts.of(site(2), torch.zeros(5, 3), 5) is Layout.ROWS
    assert layouts.of(site(2), torch.zeros(10, 3), 5) is Layout.MERGED


def test_traces_that_differ_are_not_settled() -> None:
    layouts = Layouts()
    a, b = (site(2), (4, 3), Layout.ROWS), (site(2), (5, 3), Layout.ROWS)
    assert layouts.learn([a], [b], 4, 5)[0]
    assert not layouts.learn([a, a], [b], 4, 5)[0]
    assert not layouts.learn([(site(3), (4, 3, 1), Layout.ROWS)], [b], 4, 5)[0]
