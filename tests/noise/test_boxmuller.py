"""Box-Muller: every value equals the one computed slowly in 50 digits, up to the ends of the uniforms."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privet.noise.boxmuller import LARGEST_RADIUS, normals_into

LAST = 2**53 - 1


def fast(words: list[int], std: float = 1.0) -> torch.Tensor:
    out = torch.empty(len(words), dtype=torch.float64)
    normals_into(out, torch.tensor(words, dtype=torch.int64), std=std)
    return out


def slow(radius_word: int, angle_word: int) -> tuple[float, float]:
    with mpmath.workdps(50):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf((radius_word & LAST) + 1) / 2**53))
        angle = mpmath.pi * ((angle_word + 2**31) % 2**32 - 2**31) / mpmath.mpf(2) ** 31
        return radius * mpmath.cos(angle), radius * mpmath.sin(angle)


words = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(radius_word=words, angle_word=words)
@example(radius_word=0, angle_word=0)
@example(radius_word=LAST, angle_word=1)
@example(radius_word=-1, angle_word=-1)
@example(radius_word=LAST - 1, angle_word=2**31)
@example(radius_word=2**52, angle_word=2**31 - 1)
def test_values_are_those_of_high_precision(radius_word, angle_word):
    found = fast([radius_word, angle_word]).tolist()
    for value, exact in zip(found, slow(radius_word, angle_word), strict=True):
        assert abs(value - exact) < 1e-14 * max(1.0, abs(float(exact)))


@settings(max_examples=200, deadline=None)
@given(radius_word=words, angle_word=words)
@example(radius_word=0, angle_word=2**31)
@example(radius_word=LAST, angle_word=1)
@example(radius_word=LAST - 1, angle_word=-1)
def test_float32_differs_from_high_precision_by_its_last_places(radius_word, angle_word):
    out = torch.empty(2, dtype=torch.float32)
    normals_into(out, torch.tensor([radius_word, angle_word], dtype=torch.int64), std=1.0)
    exact = [float(value) for value in slow(radius_word, angle_word)]
    for value, right in zip(out.tolist(), exact, strict=True):
        # The angle is rounded to 2**-24 of up to pi, and moves the value by so much of the radius.
        assert abs(value - right) <= 4e-7 * math.hypot(*exact)


def test_the_tails_reach_the_radius_of_53_bits():
    assert fast([0, 0])[0].item() == pytest.approx(LARGEST_RADIUS, rel=1e-15)
    assert round(LARGEST_RADIUS, 2) == 8.57
    # 24-bit uniforms end at 5.77: beyond lies a value for every radius word below 2**29.
    assert fast([2**29 - 1, 0])[0] > 5.76
    assert fast([2**20, 0])[0] > 6.7


def test_nothing_is_infinite_and_the_smallest_radius_is_zero():
    out = fast([0, 0, LAST, LAST, LAST, 0])
    assert torch.isfinite(out).all()
    assert out[4] == 0.0


def test_the_standard_deviation_scales_exactly_in_powers_of_two():
    some = [123456789 * k**9 % 2**60 for k in range(1, 65)]
    assert torch.equal(fast(some, std=4.0), 4.0 * fast(some))
    assert torch.allclose(fast(some, std=0.3), 0.3 * fast(some), rtol=1e-15, atol=0)


def test_a_pair_uses_its_own_two_words_only():
    one = fast([11, 22, 33, 44])
    assert torch.equal(one[:2], fast([11, 22]))
    assert torch.equal(one[2:], fast([33, 44]))
    assert math.hypot(*fast([11, 22]).tolist()) == pytest.approx(math.hypot(*fast([11, 99]).tolist()), rel=1e-14)
