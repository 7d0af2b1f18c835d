"""The Triton kernel of `fused`. Importing it needs Triton; nothing else does."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton reads the annotations of a kernel when it compiles it: they must not become strings, and are not Python's.
import math

import triton
import triton.language as tl

__all__ = ["BLOCK_VALUES", "add_normals"]

BLOCK_VALUES = 8  # normal values that one block of ChaCha20 makes

_ONE_GRAIN = tl.constexpr(2.0**-53)
_TURN = tl.constexpr(math.pi * 2.0**-31)


@triton.jit
def _word(words, place: tl.constexpr, like):
    """Returns one of the words of the step in every lane."""
    return like + tl.load(words + place).to(tl.uint32, bitcast=True)


@triton.jit
def _turned(word, by: tl.constexpr):
    return (word << by) | (word >> (32 - by))


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d = _turned(d ^ a, 16)
    c += d
    b = _turned(b ^ c, 12)
    a += b
    d = _turned(d ^ a, 8)
    c += d
    b = _turned(b ^ c, 7)
    return a, b, c, d


@triton.jit
def _add_pair(out, size, index, low, high, angle, std):
    """Adds the two values that two words of 64 bits make: 53 bits of the first, 32 of the second."""
    real = out.dtype.element_ty
    whole = low.to(tl.int64) | (high.to(tl.int64) & 0x1FFFFF) << 32
    logarithm = -2.0 * tl.log((whole.to(tl.float64) + 1.0) * _ONE_GRAIN)  # float64, for it makes the tails
    radius = tl.sqrt(logarithm.to(real)) * std.to(real)
    turned = angle.to(tl.int32, bitcast=True).to(real) * _TURN
    first = (index >= 0) & (index < size)
    second = (index + 1 >= 0) & (index + 1 < size)
    tl.store(out + index, tl.load(out + index, mask=first) + radius * tl.cos(turned), mask=first)
    tl.store(out + index + 1, tl.load(out + index + 1, mask=second) + radius * tl.sin(turned), mask=second)


@triton.jit(do_not_specialize=["size", "first", "skipped", "tag_low", "tag_high"])
def add_normals(out, words, size, first, skipped, tag_low, tag_high, LANES: tl.constexpr):
    """Adds the values of `LANES` blocks from block `first` on, eight of each; `skipped` of them are not ours."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    block = lane + first
    zero = (lane * 0).to(tl.uint32)
    c0, c1, c2, c3 = zero + 0x61707865, zero + 0x3320646E, zero + 0x79622D32, zero + 0x6B206574
    k0 = _word(words, 0, zero)
    k1 = _word(words, 1, zero)
    k2 = _word(words, 2, zero)
    k3 = _word(words, 3, zero)
    k4 = _word(words, 4, zero)
    k5 = _word(words, 5, zero)
    k6 = _word(words, 6, zero)
    k7 = _word(words, 7, zero)
    n0, n1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    n2, n3 = zero + tag_low.to(tl.uint32), zero + tag_high.to(tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, n0, n1, n2, n3
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    std = (tl.load(words + 8).to(tl.int64) & 0xFFFFFFFF | tl.load(words + 9).to(tl.int64) << 32).to(
        tl.float64, bitcast=True
    )
    index = lane * 8 - skipped
    _add_pair(out, size, index, x0 + c0, x1 + c1, x2 + c2, std)
    _add_pair(out, size, index + 2, x4 + k0, x5 + k1, x6 + k2, std)
    _add_pair(out, size, index + 4, x8 + k4, x9 + k5, x10 + k6, std)
    _add_pair(out, size, index + 6, x12 + n0, x13 + n1, x14 + n2, std)
