"""Decimals: rounded to the side asked for, and never further than the next of so many digits."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from privet.accounting.decimals import beside, nearest, rounded_text
from privet.errors import ConfigurationError

numbers = st.floats(1e-300, 1e300)


@given(numbers, st.integers(1, 15))
@example(0.99999999, 6)
@example(1.0000001, 6)
@example(9.9999996e-5, 6)
def test_the_text_is_on_the_side_asked_for_and_no_further_than_one_unit(value, digits):
    above, below = (float(rounded_text(value, up=up, digits=digits)) for up in (True, False))
    assert below <= value <= above
    assert above - below <= value * 10.0 ** (1 - digits) * (1 + 1e-9)


@given(st.integers(1, 999_999), st.integers(-12, 12))
def test_a_number_of_few_digits_is_shown_as_it_is(digits, exponent):
    value = float(f"{digits}e{exponent}")
    assert float(rounded_text(value, up=True)) == value == float(rounded_text(value, up=False))


@given(numbers, st.integers(2, 12))
def test_neighbors_are_neighbors(value, digits):
    here = nearest(value, digits)
    above, below = beside(here, digits, up=True), beside(here, digits, up=False)
    assert below < here < above
    assert nearest((here + above) / 2 * (1 + 1e-15), digits) in {here, above}
    assert nearest((here + below) / 2 * (1 - 1e-15), digits) in {here, below}
    assert beside(above, digits, up=False) == here == beside(below, digits, up=True)


def test_the_ends():
    assert rounded_text(math.inf, up=True) == "inf"
    assert rounded_text(0.0, up=True) == rounded_text(-0.0, up=False) == "0"
    assert rounded_text(5e-324, up=True) == "4.94066e-324"
    for bad in (-1.0, math.nan):
        with pytest.raises(ConfigurationError, match="value must be"):
            rounded_text(bad, up=True)
