"""The cut tails: the formula against integrals and against the generator itself, at radii where they can be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from privet.errors import ConfigurationError
from privet.noise import cut_tail_delta
from privet.noise.boxmuller import BITS, LARGEST_RADIUS, normals_into
from privet.noise.cut_tails import _escaped

NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def escaping(moved: float, radius: float) -> float:
    """Returns the probability that a pair, normal and cut to a disc, leaves the disc when moved: by its area."""
    # At a height y = c sin φ both circles are chords; between their right ends lies what escapes.
    turn = math.acos(min(moved / (2 * radius), 1.0))  # beyond it the whole chord escapes
    total = 0.0
    for low, high in ((0.0, turn), (turn, math.pi / 2)):
        angle = low + (high - low) * (NODES + 1) / 2
        half = radius * np.cos(angle)
        chord = ndtr(-np.maximum(half - moved, -half)) - ndtr(-half)
        height = np.exp(-((radius * np.sin(angle)) ** 2) / 2) / math.sqrt(2 * math.pi)
        total += (high - low) / 2 * float(np.sum(WEIGHTS * height * half * chord))
    return 2 * total / -math.expm1(-(radius**2) / 2)


def flux(moved: float, radius: float) -> float:
    return radius / math.pi * math.exp(-(radius**2) / 2) * moved / -math.expm1(-(radius**2) / 2)


@pytest.mark.parametrize("radius", [2.0, 3.0, LARGEST_RADIUS])
def test_a_small_move_loses_what_flows_over_the_edge_of_the_disc(radius):
    moved = 1e-4
    assert escaping(moved, radius) == pytest.approx(flux(moved, radius), rel=2e-3)
    # An interval for each value would lose √2 φ(c) a, which is c / √π times too little.
    interval = math.sqrt(2) * math.exp(-(radius**2) / 2) / math.sqrt(2 * math.pi) * moved
    assert escaping(moved, radius) > 1.1 * interval


def drawn(radius: float, pairs: int) -> torch.Tensor:  # (pairs, 2)
    """Returns pairs by the generator, from radius words that are large enough to stay within a smaller disc."""
    generator = torch.Generator().manual_seed(1)
    least = math.ceil(math.exp(-(radius**2) / 2) * 2**BITS)
    words = torch.empty(pairs, 2, dtype=torch.int64)
    words[:, 0].random_(least, 2**BITS, generator=generator)
    words[:, 1].random_(generator=generator)
    out = torch.empty(2 * pairs, dtype=torch.float64)
    normals_into(out, words.view(-1), std=1.0)
    return out.view(-1, 2)


@pytest.mark.parametrize("direction", [(1.0, 0.0), (math.sqrt(0.5), math.sqrt(0.5))])
def test_the_generator_loses_as_much_as_the_formula_says(direction):
    radius, moved, count = 3.0, 0.1, 4_000_000
    values = drawn(radius, count)
    assert values.norm(dim=1).max() <= radius * (1 + 1e-12)
    moving = values + moved * torch.tensor(direction, dtype=torch.float64)
    found = (moving.norm(dim=1) > radius).double().mean().item()
    expected = escaping(moved, radius)
    assert abs(found - expected) < 5 * math.sqrt(expected / count)
    assert found > 1.3 * math.sqrt(2) * math.exp(-4.5) / math.sqrt(2 * math.pi) * moved  # that of an interval
    assert found <= _escaped(1, moved, radius)


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0, 9.0), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_the_bound_holds_however_the_move_is_shared_among_the_pairs(radius, shares, size):
    shares[0] = max(shares[0], 0.01)
    moved = size * (radius - 1.0)
    moves = np.array(shares) / np.linalg.norm(shares) * moved
    exact = sum(escaping(float(each), radius) for each in moves)
    assert exact <= _escaped(len(moves), moved * (1 + 1e-12), radius) * (1 + 1e-9)


def test_many_pairs_lose_the_root_of_their_number():
    for dimension, sigma in [(10**9, 1.0), (10**9, 5.0), (10**7, 4.0)]:
        leading = flux(1.0 / sigma, LARGEST_RADIUS) * math.sqrt(dimension / 2)
        assert cut_tail_delta(dimension, sigma) == pytest.approx(leading, rel=0.02)
    assert cut_tail_delta(10**9, 1.0) == pytest.approx(6.8e-12, rel=0.02)


def test_steps_rates_and_shifts():
    one = cut_tail_delta(1000, 2.0)
    assert cut_tail_delta(1000, 2.0, steps=50, rate=0.1) == pytest.approx(5 * one, rel=1e-12)
    assert cut_tail_delta(1000, 2.0, shift=2.0) == cut_tail_delta(1000, 1.0) > 2 * one
    assert cut_tail_delta(999, 2.0) == one
    assert cut_tail_delta(1000, 2.0, steps=0) == 0.0
    assert cut_tail_delta(1000, 0.01) == 1.0
    for bad in [{"dimension": 0}, {"noise_multiplier": 0.0}, {"rate": 2.0}, {"steps": -1}, {"shift": math.nan}]:
        with pytest.raises(ConfigurationError):
            cut_tail_delta(**{"dimension": 10, "noise_multiplier": 1.0} | bad)
