"""Cryptographically secure Gaussian noise, drawn on the device of the sum: ChaCha20 and Box-Muller."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from privet.noise.boxmuller import normals_into
from privet.noise.chacha import VALUES, chacha_words
from privet.noise.counter import CounterNoise, Span, add_drawn, span_of
from privet.noise.fused import add_normals_, can_fuse, step_words
from privet.noise.key import NoiseKey
from privet.noise.keystream import StepKey, TagBook

__all__ = ["DeviceNoise"]

# Values drawn at once by tensor operations: many, for each is 700 kernels; each takes 150 bytes meanwhile.
_TOGETHER = 1 << 20


@final
class DeviceNoise(CounterNoise):
    """The default source on accelerators with float64. See `CounterNoise` for what it guarantees.

    The values have the law, the precision (a radius of 53-bit uniforms, its logarithm in float64) and the addresses
    of `SecureNoise`, and are drawn on the device of the tensor they are added to; the CPU is such a device, on which
    tests run. One kernel draws and adds where Triton is installed, if its values are those of tensor operations in a
    trial; elsewhere tensor operations draw, more slowly.

    ChaCha20 takes the same time for every key. The key of a step is in the device's memory while its noise is drawn.
    """

    def __init__(self, key: NoiseKey, *, purpose: str = "noise") -> None:
        super().__init__(key, purpose=purpose)
        self._keys = StepKey(key, purpose=f"{purpose} on a device")
        self._tags = TagBook()

    @property
    def secure(self) -> bool:
        """Returns True."""
        return True

    @property
    def _longest(self) -> int:
        return _TOGETHER

    def _add(self, spans: Iterable[Span], *, step: int, std: float) -> None:
        key = self._keys.at(step)
        words: dict[torch.device, Tensor] = {}
        slowly = []
        for span in spans:
            device = span.target.device
            if not _fuses(device):
                slowly.append(span)
                continue
            if device not in words:
                words[device] = step_words(key, std, device)
            target = span.target if span.target.is_contiguous() else torch.zeros_like(span.target).contiguous()
            add_normals_(target, words=words[device], tag=self._tags.tag(span.name), offset=span.offset)
            if target is not span.target:
                span.target.add_(target)
        add_drawn(slowly, lambda group: _normals(group, self._tags, key=key, std=std), together=_TOGETHER)


def _normals(spans: list[Span], tags: TagBook, *, key: bytes, std: float) -> Tensor:
    """Returns N(0, std**2) for all pairs of the spans, in their order."""
    device, blocks, nonces, taken = spans[0].target.device, [], [], []
    pairs, start = VALUES // 2, 0  # in a block
    for span in spans:
        pair = span.offset // 2
        blocks.append(torch.arange(pair // pairs, (pair + span.blocks - 1) // pairs + 1, device=device))
        # The bit pattern of the tag as a signed number.
        signed = int.from_bytes(tags.tag(span.name).to_bytes(8, "big"), "big", signed=True)
        nonces.append(torch.full_like(blocks[-1], signed))
        begin = start + 2 * (pair % pairs)
        taken.append(slice(begin, begin + 2 * span.blocks))
        start += VALUES * len(blocks[-1])
    drawn = chacha_words(torch.cat(blocks), torch.cat(nonces), key=key)
    words = torch.cat([drawn[part] for part in taken])
    out = torch.empty(words.numel(), dtype=spans[0].target.dtype, device=device)
    normals_into(out, words, std=std)
    return out


@functools.cache
def _fuses(device: torch.device) -> bool:
    """Returns whether the kernel runs on a device, and draws there what tensor operations draw. If not, says so."""
    if not can_fuse(device):
        if device.type != "cpu":
            _warn(f"Triton is not installed, so that noise on {device} is drawn")
        return False
    try:
        agree = all(_agree(dtype, device) for dtype in (torch.float32, torch.float64))
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and there is another way to go
        _warn(f"the kernel for noise failed on {device} ({type(error).__name__}: {error}), so that it is drawn")
        return False
    if not agree:
        _warn(f"the kernel for noise draws other values on {device} than its twin, so that noise is drawn")
    return agree


def _agree(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether kernel and tensor operations draw the same for a key that protects nothing."""
    key, tags, offset = bytes(range(32)), TagBook(), 2**40 + 5
    mine, twin = (torch.zeros(1003, dtype=dtype, device=device) for _ in range(2))
    add_normals_(mine, words=step_words(key, 1.0, device), tag=tags.tag("trial"), offset=offset)
    span = span_of(twin, "trial", offset, twin.numel())
    add_drawn([span], lambda group: _normals(group, tags, key=key, std=1.0), together=_TOGETHER)
    return torch.allclose(mine, twin, rtol=0.0, atol=1e-4 if dtype == torch.float32 else 1e-6)


def _warn(what: str) -> None:
    warnings.warn(
        f"{what} by some 700 tensor operations for a million values, in place of one kernel. It is as secure, and "
        "slower.",
        stacklevel=2,
    )
