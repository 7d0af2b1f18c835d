"""Gaussian noise drawn on an accelerator: keyed from the operating system, addressed, and not cryptographic."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from privet.noise.boxmuller import normals_into
from privet.noise.counter import CounterNoise, Span
from privet.noise.key import NoiseKey
from privet.noise.keystream import StepKey, TagBook
from privet.noise.philox import philox_words

__all__ = ["DeviceNoise"]


@final
class DeviceNoise(CounterNoise):
    """The default source on accelerators with float64. See `CounterNoise` for what it guarantees.

    The values have the law, the precision (a radius of 53-bit uniforms, its logarithm in float64) and the addresses
    of `SecureNoise`, and are drawn on the device of the tensor they are added to; the CPU is such a device, on which
    tests run.
    The generator, Philox4x32-10, is not cryptographic: against someone who sees many exact outputs and computes the key
    from them, use `secure_mode=True`, which draws on the host.
    """

    def __init__(self, key: NoiseKey, *, purpose: str = "noise") -> None:
        super().__init__(key, purpose=purpose)
        self._keys = StepKey(key, purpose=f"{purpose} on a device")
        self._tags = TagBook()

    @property
    def secure(self) -> bool:
        """Returns False."""
        return False

    def _normals(self, spans: list[Span], *, step: int, std: float) -> Tensor:
        device = spans[0].target.device
        key = int.from_bytes(self._keys.at(step)[:8], "big")
        blocks, tags = [], []
        for span in spans:
            first = span.offset // 2
            blocks.append(torch.arange(first, first + span.blocks, device=device))
            # The bit pattern of the tag as a signed number.
            signed = int.from_bytes(self._tags.tag(span.name).to_bytes(8, "big"), "big", signed=True)
            tags.append(torch.full((span.blocks,), signed, dtype=torch.int64, device=device))
        words = philox_words(torch.cat(blocks), torch.cat(tags), key=key)
        out = torch.empty(words.numel(), dtype=spans[0].target.dtype, device=device)
        normals_into(out, words, std=std)
        return out
