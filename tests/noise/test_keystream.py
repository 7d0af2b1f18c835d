"""The keystream: a known answer of AES-256 in counter mode, and addresses that never meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.errors import ConfigurationError
from privet.noise import Keystream, NoiseKey, SecureNoise
from privet.noise import secure as secure_module
from privet.noise.boxmuller import CHUNK
from privet.noise.keystream import BLOCK_BYTES, StepKey, TagBook, keystream_into


def context(key: bytes) -> CipherContext:
    return Cipher(AES(key), CTR(bytes(BLOCK_BYTES))).encryptor()


def test_nist_known_answer():
    # NIST SP 800-38A, F.5.5, CTR-AES256.Encrypt: the keystream is plaintext XOR ciphertext.
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    raw = bytearray(64 + BLOCK_BYTES)
    keystream_into(
        memoryview(raw),
        cipher=context(key),
        tag=int.from_bytes(counter[:8], "big"),
        block=int.from_bytes(counter[8:], "big"),
        size=64,
    )
    assert bytes(raw[:64]) == bytes(a ^ b for a, b in zip(plain, cipher, strict=True))


def test_long_keystreams_continue_over_the_inner_buffer():
    size = (1 << 20) + 64
    whole, part = bytearray(size + BLOCK_BYTES), bytearray(64 + BLOCK_BYTES)
    keystream_into(memoryview(whole), cipher=context(bytes(32)), tag=1, block=5, size=size)
    keystream_into(memoryview(part), cipher=context(bytes(32)), tag=1, block=5 + (1 << 16), size=64)
    assert whole[1 << 20 : size] == part[:64]


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 1000), count=st.integers(0, 300))
def test_words_depend_on_their_index_alone(start, count):
    stream = Keystream(NoiseKey.from_secret(bytes(32)), purpose="sampling")
    whole = stream.words(1300, step=3, name="a")
    assert np.array_equal(stream.words(count, step=3, name="a", start=start), whole[start : start + count])


def test_purposes_steps_and_names_have_streams_of_their_own():
    key = NoiseKey.fresh()
    streams = [Keystream(key, purpose=purpose) for purpose in ("sampling", "other")]
    drawn = [
        stream.words(64, step=step, name=name)
        for stream in streams
        for step in (0, 1, 2**64 - 1)
        for name in ("a", "b")
    ]
    words = np.concatenate(drawn)
    assert len(np.unique(words)) == len(words)


def test_steps_lie_in_64_bits():
    keys = StepKey(NoiseKey.fresh(), purpose="noise")
    for step in (-1, 2**64, 1.5):
        with pytest.raises(ConfigurationError, match="step"):
            keys.at(step)


def test_threads_do_not_disturb_each_other():
    """A cipher context holds its place in the stream: two threads on one source must not share it."""
    source = SecureNoise(NoiseKey.fresh())
    draw = lambda name: source.fill_(torch.empty(500), std=1.0, name=name, step=0)  # noqa: E731
    names = [f"p{number}" for number in range(400)]
    expected = [draw(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, two) for one, two in zip(pool.map(draw, names), expected, strict=True))


def test_two_names_of_one_tag_are_refused(monkeypatch):
    monkeypatch.setattr(TagBook, "hashed", staticmethod(len))
    book = TagBook()
    assert book.tag("one") == book.tag("one") == 3
    with pytest.raises(ConfigurationError, match="rename"):
        book.tag("two")


class Recorder:
    """Notes every block that a source draws, as (key, tag, block)."""

    def __init__(self) -> None:
        self.blocks: list[tuple[bytes, int, int]] = []

    def __call__(self, out, *, cipher, tag, block, size):
        drawn = bytearray(BLOCK_BYTES * 2)  # the block of this cipher at counter 0 stands for its key
        keystream_into(memoryview(drawn), cipher=cipher, tag=0, block=0, size=BLOCK_BYTES)
        self.blocks += [(bytes(drawn[:BLOCK_BYTES]), tag, block + more) for more in range(size // BLOCK_BYTES)]
        keystream_into(out, cipher=cipher, tag=tag, block=block, size=size)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    steps=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3, unique=True),
    cuts=st.lists(st.integers(0, 20), max_size=3),
)
def test_no_block_is_drawn_for_two_elements(sizes, steps, cuts):
    """Every pair of elements of every (step, name) has a block of its own, however the parameters are cut in shards."""
    recorder = Recorder()
    kept, secure_module.keystream_into = secure_module.keystream_into, recorder
    try:
        source = SecureNoise(NoiseKey.from_secret(bytes(32)))
        edges = sorted({2 * cut for cut in cuts})  # at even places, so that no pair is cut in two
        for step in steps:
            for number, size in enumerate(sizes):
                inner = [0, *[edge for edge in edges if 0 < edge < size], size]
                for first, last in pairwise(inner):
                    source.add_(torch.zeros(last - first), std=1.0, name=f"p{number}", step=step, offset=first)
    finally:
        secure_module.keystream_into = kept
    assert len(set(recorder.blocks)) == len(recorder.blocks)
    assert len(recorder.blocks) == len(steps) * sum(-(-size // 2) for size in sizes)


def test_no_block_is_drawn_twice_over_the_chunks_of_a_large_parameter(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(secure_module, "keystream_into", recorder)
    source = SecureNoise(NoiseKey.fresh())
    source.add_many([("w", torch.zeros(2 * CHUNK + 7)), ("v", torch.zeros(5))], std=1.0, step=0)
    assert len(set(recorder.blocks)) == len(recorder.blocks) == CHUNK + 4 + 3


def test_the_recorder_can_see_a_repeated_block(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(secure_module, "keystream_into", recorder)
    source = SecureNoise(NoiseKey.fresh())
    for _ in range(2):
        source.add_(torch.zeros(4), std=1.0, name="w", step=0)
    assert len(set(recorder.blocks)) < len(recorder.blocks)
