"""From uniform words to standard normal values: Box-Muller, its radius from 53-bit uniforms in float64.

Two words make two values, always: the number of draws depends on nothing, so a value has an address and its time tells
nothing of it. With u in {1, ..., 2**53} / 2**53 the radius sqrt(-2 ln u) reaches sqrt(106 ln 2) = 8.5717, so that the
tails are cut where the normal law has mass 1.0e-17. (Box and Muller, Ann. Math. Statist. 29, 1958.)
"""

from __future__ import annotations

import math
import sys
import threading

import torch
from torch import Tensor

__all__ = ["CHUNK", "LARGEST_RADIUS", "normals_into", "thread_buffer"]

# Elements worked on at once: large enough that calls cost nothing, small enough that the buffers stay in cache.
CHUNK = 1 << 17
BITS = 53
LARGEST_RADIUS = math.sqrt(2 * BITS * math.log(2))
_LOW_BITS = (1 << BITS) - 1
_ONE_GRAIN = 2.0**-BITS
_ANGLE_PLACE = 2 if sys.byteorder == "little" else 3  # of the low half of the odd word, among the halves of a pair
_local = threading.local()


def thread_buffer(role: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns `count` elements of a buffer that a thread keeps for a role: fresh memory costs more than arithmetic."""
    kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = _local.__dict__.setdefault("buffers", {})
    buffer = kept.get((role, dtype, device))
    if buffer is None or buffer.numel() < count:
        buffer = kept[role, dtype, device] = torch.empty(max(count, 64), dtype=dtype, device=device)
    return buffer[:count]


def normals_into(
    out: Tensor,  # (2 * N,) float64 or float32
    words: Tensor,  # (2 * N,) int64
    *,
    std: float,
) -> None:
    """Writes N(0, std**2) into `out`: even words give the radius by 53 bits, odd ones the angle by 32, signed.

    The logarithm, which makes the tails, is taken in float64 whatever the type of `out`. The rest is computed in that
    type: for float32 the values are those for float64 but for a few units in the last place.
    """
    pairs, drawn = words.view(-1, 2), out.view(-1, 2)
    half, device = len(pairs), out.device
    whole = thread_buffer("radius word", half, torch.int64, device)
    torch.bitwise_and(pairs[:, 0], _LOW_BITS, out=whole)
    logarithm = thread_buffer("logarithm", half, torch.float64, device).copy_(whole)
    # (x + 1) / 2**53 is exact: never 0, at most 1.
    logarithm.mul_(_ONE_GRAIN).add_(_ONE_GRAIN).log_().mul_(-2.0)
    radius = (
        logarithm if out.dtype == torch.float64 else thread_buffer("radius", half, out.dtype, device).copy_(logarithm)
    )
    radius.sqrt_().mul_(std)
    angle = thread_buffer("angle", half, out.dtype, device).copy_(words.view(torch.int32).view(-1, 4)[:, _ANGLE_PLACE])
    angle.mul_(math.pi * 2.0**-31)
    wave = thread_buffer("wave", half, out.dtype, device)
    torch.cos(angle, out=wave)
    torch.mul(radius, wave, out=drawn[:, 0])
    torch.sin(angle, out=wave)
    torch.mul(radius, wave, out=drawn[:, 1])
