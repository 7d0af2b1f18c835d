"""Shards that are several runs of a parameter: each element gets the noise of its place, and bad pieces are refused."""

from __future__ import annotations

import pytest
import torch

from privet.errors import ConfigurationError
from privet.noise import NoiseKey, SecureNoise
from privet.noise.counter import Piece


def source():
    return SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(3)))


def test_columns_of_a_matrix_get_the_noise_that_the_whole_matrix_gets_there():
    whole = source().fill_(torch.empty(5, 7), std=2.0, name="w", step=4)
    mine = torch.zeros(5, 3)
    pieces = [Piece(start=3 * row, offset=7 * row + 2, size=3) for row in range(5)]
    source().add_many([("w", mine)], std=2.0, step=4, offsets={"w": pieces})
    assert torch.allclose(mine, whole[:, 2:5], rtol=1e-6, atol=0.0)


def test_an_empty_shard_has_no_piece():
    source().add_many([("w", torch.zeros(0, 3))], std=1.0, step=0, offsets={"w": []})


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(0, 0, 3)],  # less than the shard
        [Piece(0, 0, 3), Piece(3, 2, 3)],  # two elements would get the same noise
        [Piece(0, 0, 3), Piece(4, 5, 2)],  # a gap, which would get none
        [Piece(0, 5, 3), Piece(3, 0, 3)],
        [],
    ],
)
def test_pieces_that_do_not_make_up_the_shard_are_refused_before_anything_is_drawn(pieces):
    mine = torch.zeros(6)
    with pytest.raises(ConfigurationError, match="a shard of 'w'"):
        source().add_many([("w", mine)], std=1.0, step=0, offsets={"w": pieces})
    assert not mine.any()


def test_a_shard_that_is_not_contiguous_is_refused():
    mine = torch.zeros(3, 2).t()
    with pytest.raises(ConfigurationError, match="not contiguous"):
        source().add_many([("w", mine)], std=1.0, step=0, offsets={"w": [Piece(0, 0, 3), Piece(3, 5, 3)]})
