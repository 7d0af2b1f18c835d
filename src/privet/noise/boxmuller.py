"""From uniform words to standard normal values: Box-Muller with 53-bit uniforms, in float64.

Two words make two values, always: the number of draws depends on nothing, so a value has an address and its time tells
nothing of it. With u in {1, ..., 2**53} / 2**53 the radius sqrt(-2 ln u) reaches sqrt(106 ln 2) = 8.5717, so that the
tails are cut where the normal law has mass 1.0e-17. (Box and Muller, Ann. Math. Statist. 29, 1958.)
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

__all__ = ["CHUNK", "LARGEST_RADIUS", "normals_into", "scratch"]

# Elements worked on at once: large enough that calls cost nothing, small enough that the buffers stay in cache.
CHUNK = 1 << 17
BITS = 53
LARGEST_RADIUS = math.sqrt(2 * BITS * math.log(2))
_LOW_BITS = (1 << BITS) - 1
_ONE_GRAIN = 2.0**-BITS
_local = threading.local()


def scratch(role: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns `count` elements of a buffer that a thread keeps for a role: fresh memory costs more than arithmetic."""
    kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = _local.__dict__.setdefault("buffers", {})
    buffer = kept.get((role, dtype, device))
    if buffer is None or buffer.numel() < count:
        buffer = kept[role, dtype, device] = torch.empty(max(count, 64), dtype=dtype, device=device)
    return buffer[:count]


def normals_into(
    out: Tensor,  # (2 * N,) float64
    words: Tensor,  # (2 * N,) int64, overwritten
    *,
    std: float,
) -> None:
    """Writes N(0, std**2) into `out`, from the low 53 bits of the words: even ones the radius, odd ones the angle."""
    half = out.numel() // 2
    radius = scratch("radius", half, torch.float64, out.device)
    angle = scratch("angle", half, torch.float64, out.device)
    wave = scratch("wave", half, torch.float64, out.device)
    words.bitwise_and_(_LOW_BITS)
    out.copy_(words)
    drawn = out.view(-1, 2)
    # (x + 1) / 2**53 is exact: never 0, at most 1.
    torch.mul(drawn[:, 0], _ONE_GRAIN, out=radius)
    radius.add_(_ONE_GRAIN).log_().mul_(-2.0).sqrt_().mul_(std)
    torch.mul(drawn[:, 1], 2 * math.pi * _ONE_GRAIN, out=angle)
    torch.cos(angle, out=wave)
    torch.mul(radius, wave, out=drawn[:, 0])
    torch.sin(angle, out=wave)
    torch.mul(radius, wave, out=drawn[:, 1])
