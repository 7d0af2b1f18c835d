"""The examples in a `PackedSequence`: each is one sequence, counted and cut in the order in which it was packed.

A packed sequence keeps its sequences sorted by length, the longest first, and its elements by time. If it was packed
with `enforce_sorted=True`, it says nothing of an order of its own (`sorted_indices` is None), and what is made of it
here says nothing either. So sequences that are joined to it must be no longer than its last.

Axes: B sequences, T positions of the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

__all__ = ["cut_sequences", "detached", "join_sequences", "sequences_in", "zero_sequences"]


def sequences_in(packed: PackedSequence) -> int:
    """Returns B."""
    return int(packed.batch_sizes[0]) if packed.batch_sizes.numel() else 0


def _padded(packed: PackedSequence) -> tuple[Tensor, Tensor]:  # (B, T, ...) and the lengths (B,)
    if packed.data.shape[0] == 0:
        return packed.data.new_zeros(0, 0, *packed.data.shape[1:]), torch.zeros(0, dtype=torch.int64)
    return pad_packed_sequence(packed, batch_first=True)


def _packed(rows: Tensor, lengths: Tensor, like: PackedSequence) -> PackedSequence:
    if len(lengths):
        rows = rows[:, : int(lengths.max())]
        return pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=like.sorted_indices is None)
    nowhere = like.batch_sizes.new_zeros(0)
    order = None if like.sorted_indices is None else like.sorted_indices.new_zeros(0)
    return PackedSequence(like.data.new_zeros(0, *like.data.shape[1:]), nowhere, order, order)


def cut_sequences(packed: PackedSequence, start: int, stop: int) -> PackedSequence:
    """Returns sequences `start` to `stop`, in the order in which they were packed."""
    rows, lengths = _padded(packed)
    return _packed(rows[start:stop], lengths[start:stop], packed)


def join_sequences(first: PackedSequence, second: PackedSequence) -> PackedSequence:
    """Returns the sequences of both, those of `first` before those of `second`."""
    (rows, lengths), (more, others) = _padded(first), _padded(second)
    longest = max(rows.shape[1], more.shape[1])
    rows, more = (
        torch.cat([part, part.new_zeros(part.shape[0], longest - part.shape[1], *part.shape[2:])], dim=1)
        for part in (rows, more)
    )
    return _packed(torch.cat([rows, more]), torch.cat([lengths, others]), first)


def zero_sequences(like: PackedSequence, count: int) -> PackedSequence:
    """Returns `count` sequences of one zero element each: the shortest that a packed sequence can hold."""
    rows = like.data.new_zeros(count, 1, *like.data.shape[1:])
    return _packed(rows, torch.ones(count, dtype=torch.int64), like)


def detached(packed: PackedSequence) -> PackedSequence:
    """Returns the same sequences without their graph."""
    return PackedSequence(packed.data.detach(), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
