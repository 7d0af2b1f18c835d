"""Exact draws from the discrete Gaussian law, many at once, each a function of (key, step, name, index).

Element j has a block of AES-256 for each attempt and each depth, two words of 64 bits. In attempt a

    depth 0, first word    63 bits v: the strip is the number of tails R_j above v / 2^63
             second word   from below: x; then the first bits of u; at the top the sign
    depth 1, 2, ...        first word: more bits of u; second word: more bits of v

A proposal is accepted if u < e^(-E), and not -0, or else the next attempt decides. Attempt 0 draws for all elements.
Nearly all are accepted at once, since u is below the least e^(-E) of any strip: whether one is does not tell its strip.
The others are compared in float64, and where that comes within 2^-40 of a tie, in integers with as many bits as it
takes. So each value has its law exactly, given ideal bits, and does not depend on how float64 functions round.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privet.noise.discrete_law import LEAST_TAIL, DiscreteLaw, cells_of, exponential
from privet.noise.key import NoiseKey
from privet.noise.keystream import BLOCK_BYTES, StepKey, TagBook, keystream_into, scattered_words

__all__ = ["CHUNK", "DiscreteDraw"]

Ints = NDArray[np.int64]
CHUNK = 1 << 16
"""Elements worked on at once: few enough that what is in between stays in cache."""

_LOW_63 = 2**63 - 1
_MARGIN = 2.0**-40  # far above any rounding of a float64 function, and far below what would take time


class DiscreteDraw:
    """Draws under one key, for one purpose.

    Args:
        key: whose values nobody else uses for this purpose.
        purpose: its name.
    """

    def __init__(self, key: NoiseKey, *, purpose: str) -> None:
        self._key = key
        self._purpose = purpose
        self._tags = TagBook()
        self._streams: dict[tuple[int, int], StepKey] = {}

    def values(self, law: DiscreteLaw, count: int, *, step: int, name: str, start: int) -> Ints:
        """Returns `count` values of a name from index `start` on, at most `CHUNK` of them: shape (count,)."""
        assert count <= CHUNK
        size = count * BLOCK_BYTES
        raw = bytearray(size + BLOCK_BYTES)
        tag = self._tags.tag(name)
        keystream_into(memoryview(raw), cipher=self._stream(0, 0).cipher(step), tag=tag, block=start, size=size)
        words = np.frombuffer(raw, dtype="<i8", count=2 * count).astype(np.int64, copy=False).reshape(-1, 2)
        strips, open_strip = _strips(law, words[:, 0])
        found, again = _signed(law, strips, words[:, 1])
        waiting = np.flatnonzero((_first_bits(law, words[:, 1]) >= law.sure) | open_strip | again)
        self._settle(law, found, waiting, words[waiting], step=step, tag=tag, start=start)
        return found

    def _settle(
        self, law: DiscreteLaw, found: Ints, waiting: Ints, words: Ints, *, step: int, tag: int, start: int
    ) -> None:
        """Writes accepted values at the places that wait: those of attempt 0 first, with its words."""
        attempt = 0
        while True:
            strips, open_strip = _strips(law, words[:, 0])
            values, negative_zero = _signed(law, strips, words[:, 1])
            more = scattered_words(waiting + start, cipher=self._stream(attempt, 1).blocks(step), tag=tag)
            margin = _margin(law, strips, words[:, 1], more[:, 0])
            accepted = (margin > 0.0) & ~negative_zero
            for place in np.flatnonzero(open_strip | (np.abs(margin) < _MARGIN)):
                value = self._exactly(law, attempt, int(waiting[place]) + start, step=step, tag=tag)
                accepted[place], values[place] = value is not None, value or 0
            found[waiting[accepted]] = values[accepted]
            attempt, waiting = attempt + 1, waiting[~accepted]
            if not len(waiting):
                return
            words = scattered_words(waiting + start, cipher=self._stream(attempt, 0).blocks(step), tag=tag)

    def _exactly(self, law: DiscreteLaw, attempt: int, index: int, *, step: int, tag: int) -> int | None:
        """Returns what an attempt gives for one element, in integers alone, or None where it is rejected."""

        def block(depth: int) -> tuple[int, int]:
            cipher = self._stream(attempt, depth).blocks(step)
            one, two = scattered_words(np.array([index]), cipher=cipher, tag=tag)[0].tolist()
            return one % 2**64, two % 2**64

        first, second = block(0)
        drawn, bits, depth = first & _LOW_63, 63, 0
        while (strip := law.exact_tails(_digits(bits)).strip(drawn, bits)) is None:
            depth += 1
            drawn, bits = drawn << 64 | block(depth)[1], bits + 64
        x = second & (1 << law.width_bits) - 1
        size = (strip << law.width_bits) + x
        negative = second >> 63
        if negative and size == 0:
            return None
        numerator, denominator = x * (2 * (size - x) + x), 2 * law.scale**2
        # Of strips that are nearly never met E may be above 1: e^-E = (e^(-E/n))^n, in as many factors as it takes.
        parts = 1 + numerator // denominator
        drawn, bits, depth = second >> law.width_bits & (1 << law.accept_bits) - 1, law.accept_bits, 0
        while True:
            digits = _digits(bits)
            whole = 1 << digits
            share = exponential(numerator, denominator * parts, digits)
            accept = whole
            for _ in range(parts):
                accept = accept * share >> digits
            error = parts * (digits + 16)
            if drawn + 1 << digits - bits <= accept - error:
                return _wrapped(-size if negative else size)
            if drawn << digits - bits >= accept + error:
                return None
            depth += 1
            drawn, bits = drawn << 64 | block(depth)[0], bits + 64

    def _stream(self, attempt: int, depth: int) -> StepKey:
        found = self._streams.get((attempt, depth))
        if found is None:
            found = StepKey(self._key, purpose=f"{self._purpose}.{attempt}.{depth}")
            if attempt <= 1 and depth <= 1:  # others are too rare to be kept
                self._streams[attempt, depth] = found
        return found


def _strips(law: DiscreteLaw, words: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Returns the strip that the first 63 bits of v say, and where more bits are needed to say it."""
    tables = law.tables
    drawn = words & _LOW_63
    strips = np.take(tables.guide, cells_of(drawn) - tables.first_cell, mode="clip")
    open_strip = drawn < LEAST_TAIL
    for _ in range(tables.most):
        tail = np.take(tables.tails, strips, mode="clip")
        strips += drawn < tail
        open_strip |= drawn == tail  # all other tails lie in cells above or below
    return strips, open_strip


def _signed(law: DiscreteLaw, strips: Ints, words: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Returns the proposed values, and where one is -0, which would count zero twice."""
    sizes = (strips << law.width_bits) + (words & (1 << law.width_bits) - 1)
    signs = words >> 63
    return (sizes ^ signs) - signs, (sizes == 0) & (signs < 0)


def _first_bits(law: DiscreteLaw, words: Ints) -> Ints:
    """Returns the first bits of u."""
    return words >> law.width_bits & (1 << law.accept_bits) - 1


def _margin(law: DiscreteLaw, strips: Ints, words: Ints, more: Ints) -> NDArray[np.float64]:
    """Returns e^(-E) - u, to within far less than `_MARGIN`, from the first bits of u and 64 more."""
    x = (words & (1 << law.width_bits) - 1).astype(np.float64)
    start = (strips << law.width_bits).astype(np.float64)
    exponent = x * (2.0 * start + x) / (2.0 * float(law.scale) ** 2)
    below = more.astype(np.float64) * 2.0**-64
    share = np.where(below < 0.0, below + 1.0, below)  # the words are unsigned
    u = (_first_bits(law, words).astype(np.float64) + share) * 2.0**-law.accept_bits
    return np.asarray(np.exp(-exponent) - u, dtype=np.float64)


def _digits(bits: int) -> int:
    """Returns with how many digits a number of so many bits is compared."""
    return bits + 129


def _wrapped(value: int) -> int:
    """Returns a whole number as the int64 that is equal to it modulo 2^64; all sums here are taken so."""
    return (value + 2**63) % 2**64 - 2**63
