"""Cryptographically secure Gaussian noise, drawn on the host: AES-256 in counter mode and Box-Muller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from privet.noise.boxmuller import CHUNK, normals_into, thread_buffer
from privet.noise.counter import CounterNoise, Span, add_drawn
from privet.noise.key import NoiseKey
from privet.noise.keystream import BLOCK_BYTES, StepKey, TagBook, keystream_into

__all__ = ["SecureNoise"]

_HOST = torch.device("cpu")


@final
class SecureNoise(CounterNoise):
    """The default source on CPU, and everywhere under `secure_mode=True`. See `CounterNoise` for what it guarantees."""

    def __init__(self, key: NoiseKey, *, purpose: str = "noise") -> None:
        super().__init__(key, purpose=purpose)
        self._keys = StepKey(key, purpose=purpose)
        self._tags = TagBook()

    @property
    def secure(self) -> bool:
        """Returns True."""
        return True

    @property
    def _longest(self) -> int:
        return CHUNK

    def _add(self, spans: Iterable[Span], *, step: int, std: float) -> None:
        add_drawn(spans, lambda group: self._normals(group, step=step, std=std), together=CHUNK)

    def _normals(self, spans: list[Span], *, step: int, std: float) -> Tensor:
        cipher = self._keys.cipher(step)
        size = sum(span.blocks for span in spans) * BLOCK_BYTES
        raw = thread_buffer("keystream", size + BLOCK_BYTES, torch.uint8, _HOST)
        view: memoryview = raw.numpy().data
        start = 0
        for span in spans:  # in order: each call may spill one block into its successor's place
            part = span.blocks * BLOCK_BYTES
            keystream_into(
                view[start:], cipher=cipher, tag=self._tags.tag(span.name), block=span.offset // 2, size=part
            )
            start += part
        words = raw[:size].view(torch.int64)
        out = thread_buffer("normals", words.numel(), spans[0].target.dtype, _HOST)
        normals_into(out, words, std=std)
        return out
