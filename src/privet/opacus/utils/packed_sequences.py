"""Packed sequences: their lengths, and random ones for tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

__all__ = ["compute_seq_lengths"]


def compute_seq_lengths(batch_sizes: Tensor) -> list[int]:
    """Returns the lengths of the sequences that are packed, the longest first.

    Args:
        batch_sizes: how many sequences have an element at each position, (T,).
    """
    return [int((batch_sizes > index).sum()) for index in range(int(batch_sizes[0]))]


def _gen_packed_data(
    minibatch_size: int,
    max_seq_length: int,
    input_dim: int,
    batch_first: bool,  # noqa: FBT001 - Opacus's signature
    sorted_: bool | None = False,  # noqa: FBT001, FBT002
) -> PackedSequence:
    """Returns packed sequences of random lengths and values, for tests."""
    lengths = torch.randint(1, max_seq_length + 1, (minibatch_size,)).tolist()
    if sorted_:
        lengths.sort(reverse=True)
    return pack_sequence([torch.randn(length, input_dim) for length in lengths], enforce_sorted=bool(sorted_))
