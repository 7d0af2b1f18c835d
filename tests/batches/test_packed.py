"""The sequences of a packed sequence: counted, cut, joined and made up, in the order in which they were packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from privet.batches.packed import cut_sequences, detached, join_sequences, sequences_in, zero_sequences

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=7)
KINDS = pytest.mark.parametrize("rest", [(), (3,), (2, 2)], ids=str)


def sequences(lengths: list[int], rest: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(10 * torch.randn(n, *rest)).to(dtype) for n in lengths]


def same(found: PackedSequence, expected: list[Tensor]) -> bool:
    got = unpack_sequence(found) if expected else []
    return len(got) == len(expected) == sequences_in(found) and all(map(torch.equal, got, expected))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@given(lengths=LENGTHS, data=st.data())
def test_a_part_has_the_sequences_as_they_were_packed(rest, dtype, lengths, data) -> None:
    rows = sequences(lengths, rest, dtype)
    whole = pack_sequence(rows, enforce_sorted=False)
    assert sequences_in(whole) == len(rows)
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    part = cut_sequences(whole, start, stop)
    assert same(part, rows[start:stop])
    assert part.data.shape[1:] == rest
    assert part.data.dtype == dtype
    assert part.sorted_indices is not None
    assert part.unsorted_indices is not None


@KINDS
@given(lengths=LENGTHS, others=LENGTHS)
def test_joined_sequences_come_one_after_the_other(rest, lengths, others) -> None:
    first, second = sequences(lengths, rest), sequences(others, rest)
    whole = [pack_sequence(rows, enforce_sorted=False) for rows in (first, second)]
    assert same(join_sequences(*whole), first + second)
    nobody = cut_sequences(whole[0], 0, 0)
    assert same(join_sequences(nobody, whole[1]), second)
    assert same(join_sequences(whole[0], nobody), first)
    assert sequences_in(join_sequences(nobody, nobody)) == 0


@given(lengths=LENGTHS)
def test_sorted_sequences_stay_sorted_and_say_nothing_of_an_order(lengths) -> None:
    rows = sequences(sorted(lengths, reverse=True), ())
    whole = pack_sequence(rows)
    assert whole.sorted_indices is None
    last = cut_sequences(whole, len(rows) - 1, len(rows))
    for found, expected in (
        (cut_sequences(whole, 0, len(rows) // 2), rows[: len(rows) // 2]),
        (join_sequences(whole, last), [*rows, rows[-1]]),
        (join_sequences(whole, zero_sequences(whole, 2)), [*rows, torch.zeros(1), torch.zeros(1)]),
    ):
        assert same(found, expected)
        assert found.sorted_indices is None


def test_a_longer_sequence_cannot_follow_where_there_is_no_order() -> None:
    short, long = pack_sequence([torch.ones(1)]), pack_sequence([torch.ones(3)])
    with pytest.raises(RuntimeError, match="sorted"):
        join_sequences(short, long)


def test_gradients_reach_the_elements_of_a_part() -> None:
    rows = [t.requires_grad_() for t in sequences([2, 3], ())]
    whole = pack_sequence(rows, enforce_sorted=False)
    cut_sequences(whole, 1, 2).data.sum().backward()
    assert rows[1].grad is not None
    assert rows[1].grad.tolist() == [1.0] * 3
    assert rows[0].grad is None or not rows[0].grad.any()
    assert not detached(whole).data.requires_grad


def test_made_up_sequences_are_of_one_zero_element() -> None:
    whole = pack_sequence(sequences([2, 3], (4,)), enforce_sorted=False)
    assert same(zero_sequences(whole, 3), [torch.zeros(1, 4)] * 3)
    assert sequences_in(zero_sequences(whole, 0)) == 0
