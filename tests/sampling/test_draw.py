"""The law of a batch: frequencies, sizes, pairs and neighbouring batches, each by a test that rejects a wrong law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privet.noise import Keystream, NoiseKey
from privet.sampling.draw import poisson_indices, shuffled_indices
from tests.sampling.law import LEVEL, refutations

BATCHES = 6_000


def stream(seed: int = 0) -> Keystream:
    return Keystream(NoiseKey.from_generator(torch.Generator().manual_seed(seed)), purpose="sampling")


def masks(rate: float, size: int, batches: int, seed: int = 0) -> np.ndarray:  # (batches, size) bool
    source = stream(seed)
    out = np.zeros((batches, size), dtype=bool)
    for step in range(batches):
        out[step, poisson_indices(source, rate=rate, size=size, step=step, name="p")] = True
    return out


@pytest.mark.parametrize("rate", [0.003, 0.1, 1 / 3, 0.5, 0.97])
def test_every_example_joins_independently_at_the_rate(rate):
    assert refutations(masks(rate, 60, BATCHES), rate) == []


def test_wrong_laws_are_refuted():
    right = masks(0.1, 60, BATCHES)
    assert refutations(right, 0.105)
    # A rate floored to 1 / len(loader), as one would have from 60 examples in batches of 7: 1 / 8 for 7 / 60.
    assert refutations(masks(1 / 8, 60, BATCHES), 7 / 60)
    rng = np.random.default_rng(0)
    fixed_size = np.argsort(rng.random((BATCHES, 60)), axis=1) < 6
    assert "law of the batch size" in refutations(fixed_size, 0.1)
    together = right.copy()
    together[:, 1] = together[:, 0]
    assert "pairs of examples" in refutations(together, 0.1)
    assert "neighbouring batches" in refutations(np.repeat(right[: BATCHES // 2], 2, axis=0), 0.1)
    uneven = right.copy()
    uneven[:, 59] = False
    assert "frequency of each example" in refutations(uneven, 0.1)


@pytest.mark.parametrize("rate", [0.02, 0.4, 0.9])
def test_gaps_equal_those_of_a_plain_walk_over_the_same_words(rate):
    """The vectorised draw against one gap after another, in plain Python."""
    source, size = stream(), 500
    for step in range(20):
        words = iter(source.words(4000, step=step, name="p").tolist())
        expected, position = [], -1
        while True:
            uniform = min((next(words) + 0.5) / 2**64, 1 - 2**-53)
            position += int(np.log1p(-uniform) / np.log1p(-rate)) + 1
            if position >= size:
                break
            expected.append(position)
        assert poisson_indices(source, rate=rate, size=size, step=step, name="p").tolist() == expected


@settings(max_examples=100, deadline=None)
@given(rate=st.floats(0, 1), size=st.integers(0, 300), step=st.integers(0, 2**63))
def test_indices_are_distinct_ascending_and_within_the_data(rate, size, step):
    drawn = poisson_indices(stream(), rate=rate, size=size, step=step, name="p")
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()
    assert not drawn.size or (drawn[0] >= 0 and drawn[-1] < size)


def test_the_ends_of_the_rate():
    assert poisson_indices(stream(), rate=0.0, size=50, step=0, name="p").size == 0
    assert poisson_indices(stream(), rate=1.0, size=50, step=0, name="p").tolist() == list(range(50))
    assert poisson_indices(stream(), rate=5e-324, size=10**12, step=0, name="p").size == 0
    nearly = poisson_indices(stream(), rate=1 - 2**-53, size=1000, step=0, name="p")
    assert nearly.tolist() == list(range(1000))


def test_a_batch_costs_what_it_holds_not_what_the_data_hold():
    drawn = poisson_indices(stream(), rate=1e-10, size=10**12, step=0, name="p")
    assert 30 < drawn.size < 200  # Poisson with mean 100


def test_more_gaps_are_drawn_until_the_data_end(monkeypatch):
    # So few are asked for at first that every batch needs more.
    monkeypatch.setattr("privet.sampling.draw.math.ceil", lambda _: -5)
    drawn = poisson_indices(stream(), rate=0.5, size=200, step=0, name="p")
    monkeypatch.undo()
    assert drawn.tolist() == poisson_indices(stream(), rate=0.5, size=200, step=0, name="p").tolist()
    assert 60 < drawn.size < 140


def test_a_shuffle_is_a_uniform_permutation():
    source, size, times = stream(), 5, 8_000
    orders = [tuple(shuffled_indices(source, size=size, step=step, name="s").tolist()) for step in range(times)]
    kinds, counts = np.unique(np.array(orders), axis=0, return_counts=True)
    assert len(kinds) == 120
    assert stats.chisquare(counts).pvalue > LEVEL
