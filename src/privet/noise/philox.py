"""Philox4x32-10 words in plain tensor operations: the same bits on every device.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. Addressed by a
128-bit counter under a 64-bit key, and *not* cryptographic: who sees enough of the words can compute the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["philox_words"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox_words(
    blocks: Tensor,  # (N,) int64, the lower half of the counter
    tags: Tensor,  # (N,) int64, its upper half as a bit pattern
    *,
    key: int,  # 64 bits
) -> Tensor:  # (2 * N,) int64
    """Returns two 64-bit words for every block, as bit patterns."""
    counter = [blocks & _LOW, (blocks >> 32) & _LOW, tags & _LOW, (tags >> 32) & _LOW]
    first, second = key & _LOW, key >> 32
    for _ in range(_ROUNDS):
        high0, low0 = _product(counter[0], _MULTIPLIERS[0])
        high1, low1 = _product(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ first, low1, high0 ^ counter[3] ^ second, low0]
        first, second = (first + _WEYL[0]) & _LOW, (second + _WEYL[1]) & _LOW
    return torch.stack((counter[0] | counter[1] << 32, counter[2] | counter[3] << 32), dim=1).view(-1)


def _product(value: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Returns the upper and the lower 32 bits of a product of two 32-bit numbers."""
    # int64 wraps modulo 2**64, so the bits are those of the unsigned product; only the shift has to forget the sign.
    full = value * factor
    return (full >> 32) & _LOW, full & _LOW
