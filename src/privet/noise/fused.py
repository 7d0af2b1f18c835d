"""ChaCha20, Box-Muller and the addition in one kernel, which Triton compiles. Its twin is `chacha` with `boxmuller`.

One lane draws one block of ChaCha20, which is eight normal values, and adds them: nothing is stored in between. It is
960 integer operations, four logarithms in float64 and eight sines and cosines for eight values.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import struct

import torch
from torch import Tensor

__all__ = ["add_normals_", "can_fuse", "step_words"]

_LANES = 128


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_fuse(device: torch.device) -> bool:
    """Returns whether the kernel runs on a device: Triton is installed, and compiles for it or interprets."""
    if device.type == "cpu":
        return _installed() and os.environ.get("TRITON_INTERPRET") == "1"
    return _installed() and device.type in {"cuda", "xpu"}


def step_words(key: bytes, std: float, device: torch.device) -> Tensor:  # (10,) int32
    """Returns all that changes from step to step, on the device: the eight words of the key, and the two of `std`.

    A captured graph that is run again draws what this tensor says by then.
    """
    return torch.frombuffer(bytearray(struct.pack("<32sd", key, std)), dtype=torch.int32).to(device)


def add_normals_(
    out: Tensor,  # contiguous, float32 or float64
    *,
    words: Tensor,  # those of the step
    tag: int,
    offset: int,
) -> None:
    """Adds N(0, std**2) to `out`, which holds the elements of a parameter from index `offset` on."""
    from privet.noise.fused_kernel import BLOCK_VALUES, add_normals

    first, skipped = divmod(offset, BLOCK_VALUES)
    blocks = -(-(skipped + out.numel()) // BLOCK_VALUES)
    low, high = (_signed(tag >> shift & 0xFFFFFFFF) for shift in (0, 32))
    with torch.device(out.device):
        add_normals[(-(-blocks // _LANES),)](out, words, out.numel(), first, skipped, low, high, LANES=_LANES)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
