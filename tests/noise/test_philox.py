"""Philox4x32-10: the known answers of its authors, and a plain twin in Python's whole numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.noise.philox import philox_words


def twin(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper writes it."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        one, two = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            two >> 32 ^ counter[1] ^ key[0],
            two % 2**32,
            one >> 32 ^ counter[3] ^ key[1],
            one % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def tensors(counter: list[int], key: list[int]) -> list[int]:
    low, high = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32
    words = philox_words(torch.tensor([signed(low)]), torch.tensor([signed(high)]), key=key[0] | key[1] << 32).tolist()
    return [half for word in words for half in (word % 2**64 % 2**32, word % 2**64 >> 32)]


# The authors' known-answer file (Random123, kat_vectors, philox 4x32 10).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert twin(counter, key) == expected
    assert tensors(counter, key) == expected


half = st.integers(0, 2**32 - 1)


@settings(max_examples=100, deadline=None)
@given(counter=st.lists(half, min_size=4, max_size=4), key=st.lists(half, min_size=2, max_size=2))
def test_the_tensor_form_is_the_twin(counter, key):
    assert tensors(counter, key) == twin(counter, key)
