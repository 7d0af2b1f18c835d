"""ChaCha20 words in plain tensor operations: the same bits on every device, cryptographic, in constant time.

Bernstein, "ChaCha, a variant of Salsa20", 2008, with counter and nonce of 64 bits each; RFC 8439, section 2.3, has the
same block function. Axes: N blocks; the 16 words of a state are 4 rows of 4.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

__all__ = ["KEY_WORDS", "VALUES", "chacha_words", "key_words"]

VALUES = 8  # 64-bit words in a block, and so as many normal values
KEY_WORDS = 8
_CONSTANTS = struct.unpack("<4I", b"expand 32-byte k")
_DOUBLE_ROUNDS = 10
_LOW = 0xFFFFFFFF


def key_words(key: bytes) -> tuple[int, ...]:
    """Returns the eight 32-bit words of a key of 32 bytes."""
    return struct.unpack("<8I", key)


def chacha_words(
    blocks: Tensor,  # (N,) int64, the counter as a bit pattern
    tags: Tensor,  # (N,) int64, the nonce as a bit pattern
    *,
    key: bytes,  # 32 of them
) -> Tensor:  # (8 * N,) int64
    """Returns eight 64-bit words for every block, as bit patterns."""
    start = torch.empty((16, blocks.numel()), dtype=torch.int64, device=blocks.device)
    for row, word in enumerate((*_CONSTANTS, *key_words(key))):
        start[row] = word
    for row, halves in ((12, blocks), (14, tags)):
        start[row], start[row + 1] = halves & _LOW, (halves >> 32) & _LOW
    a, b, c, d = torch.split(start.clone(), 4)
    for _ in range(_DOUBLE_ROUNDS):
        a, b, c, d = _quarter_rounds(a, b, c, d)  # of the four columns
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))  # of the four diagonals
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    words = (torch.cat((a, b, c, d)) + start) & _LOW
    return (words[0::2] | words[1::2] << 32).T.reshape(-1)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns four quarter rounds at once, one in each row."""
    for first, second in ((16, 12), (8, 7)):
        a = (a + b) & _LOW
        d = _turned(d ^ a, first)
        c = (c + d) & _LOW
        b = _turned(b ^ c, second)
    return a, b, c, d


def _turned(word: Tensor, by: int) -> Tensor:
    """Returns 32-bit words whose bits are turned to the left."""
    return (word << by | word >> (32 - by)) & _LOW
