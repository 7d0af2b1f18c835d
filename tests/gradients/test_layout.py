"""Where the examples are: told by two sizes of a batch, held to ever after, and never guessed in doubt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet import UnsupportedModelError
from privet.gradients.layout import Layout, Layouts, Site, Trace

small = st.integers(1, 6)


def site(axes: int) -> Site:
    return Site(torch.add, ("weight",), 0, axes)


def shape_of(layout: Layout, b: int, t: int, d: int) -> tuple[int, ...]:
    return {
        Layout.ROWS: (b, t, d),
        Layout.MERGED: (b * t, d),
        Layout.SECOND: (t, b, d),
        Layout.CONSTANT: (t, d),
    }[layout]


def learned(layout: Layout, b: int, t: int, d: int) -> Layouts:
    layouts = Layouts()
    first, second = shape_of(layout, b, t, d), shape_of(layout, b + 1, t, d)
    for _ in range(3):
        traces = []
        for shape, n in ((first, b), (second, b + 1)):
            trace: Trace = []
            layouts.of(site(len(shape)), torch.zeros(shape, requires_grad=True), n, trace=trace)
            traces.append(trace)
        if layouts.learn(traces[0], traces[1], b, b + 1):
            return layouts
    raise AssertionError("not settled")


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([layout for layout in Layout if layout is not Layout.ROUTED]), small, small, small, small)
def test_what_was_learned_from_one_batch_holds_for_every_other(
    layout: Layout, b: int, t: int, d: int, other: int
) -> None:
    layouts = learned(layout, b, t, d)
    shape = shape_of(layout, other, t, d)
    found = layouts.of(site(len(shape)), torch.zeros(shape), other)
    expected = Layout.ROWS if layout is Layout.MERGED and t == 1 else layout
    assert found is expected


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([Layout.ROWS, Layout.MERGED, Layout.SECOND]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_examples_come_first_in_every_layout(layout: Layout, b: int, t: int, d: int) -> None:
    rows = torch.arange(b * t * d).view(b, t, d)
    lying = {Layout.ROWS: rows, Layout.MERGED: rows.reshape(b * t, d), Layout.SECOND: rows.transpose(0, 1)}[layout]
    assert torch.equal(layout.examples_first(lying, b, batch_first=True), rows)
    if layout is Layout.MERGED:
        inside = rows.transpose(0, 1).reshape(b * t, d)
        assert torch.equal(layout.examples_first(inside, b, batch_first=False), rows)


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


def test_a_new_site_is_rows_only_if_it_depends_on_what_was_captured() -> None:
    layouts = learned(Layout.ROWS, 4, 2, 3)
    with pytest.raises(UnsupportedModelError, match="not met on the first batch"):
        layouts.of(site(2), torch.zeros(5, 3), 5)
    assert layouts.of(site(2), torch.zeros(5, 3, requires_grad=True), 5) is Layout.ROWS
    with pytest.raises(UnsupportedModelError, match="not met on the first batch"):
        layouts.of(site(4), torch.zeros(10, 3, 1, 1, requires_grad=True), 5)


def test_traces_that_differ_are_not_settled() -> None:
    layouts = Layouts()
    a, b = (site(2), (4, 3), Layout.ROWS), (site(2), (5, 3), Layout.ROWS)
    assert layouts.learn([a], [b], 4, 5)
    assert not layouts.learn([a, a], [b], 4, 5)
    assert not layouts.learn([(site(3), (4, 3, 1), Layout.ROWS)], [b], 4, 5)
