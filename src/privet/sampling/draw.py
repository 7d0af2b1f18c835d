"""Which examples make a batch, drawn from secret words: the law of each sampling, without any loader."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from privet.noise.keystream import Keystream

__all__ = [
    "MOST_STEPS",
    "Places",
    "address",
    "chosen_indices",
    "intervals",
    "poisson_indices",
    "random_places",
    "shuffled_indices",
]

MOST_STEPS = 2**32  # batches in a pass

_BELOW_ONE = 1.0 - 2.0**-53


def address(number: int, index: int) -> int:
    """Returns the step of the keystream for batch `index` of pass `number`: no two batches share one."""
    return number << 32 | index


def poisson_indices(
    stream: Keystream, *, rate: float, size: int, step: int, name: str
) -> npt.NDArray[np.int64]:  # (m,), ascending
    """Returns the examples of one batch: each of `size` examples independently with probability `rate`.

    The gaps between chosen examples are geometric, P(gap >= k) = (1 - rate)**k, and are drawn by inversion, so that a
    batch costs what it holds and not what the dataset holds. Uniforms have a grain of 2**-64 where a gap is 0.
    (Devroye, Non-Uniform Random Variate Generation, 1986, chapter X, section 2.)
    """
    if rate == 0.0 or size == 0:
        return np.empty(0, dtype=np.int64)
    if rate == 1.0:
        return np.arange(size, dtype=np.int64)
    mean = rate * size
    count = math.ceil(mean + 6.0 * math.sqrt(mean)) + 8
    scale = math.log1p(-rate)
    parts = []
    start, position = 0, -1
    while position < size:
        uniform = (stream.words(count, step=step, name=name, start=start) + 0.5) * 2.0**-64
        with np.errstate(over="ignore"):  # at rates near 1e-308 a gap may be infinite: it is cut to the size below
            gaps = np.log1p(-np.minimum(uniform, _BELOW_ONE)) / scale
        chosen = position + np.cumsum(np.minimum(gaps, size).astype(np.int64) + 1)
        parts.append(chosen)
        position = int(chosen[-1])
        start += count
    drawn = np.concatenate(parts)
    return drawn[drawn < size]


def shuffled_indices(stream: Keystream, *, size: int, step: int, name: str) -> npt.NDArray[np.int64]:  # (size,)
    """Returns a uniformly random order of `size` examples: the order of as many secret words."""
    # Two equal words, which would be ordered by index, are met with probability size**2 / 2**65.
    return np.argsort(stream.words(size, step=step, name=name), kind="stable").astype(np.int64)


class Places(NamedTuple):
    """Examples dealt to places: those of place i are `examples[starts[i] : starts[i + 1]]`, ascending."""

    examples: npt.NDArray[np.int64]  # (size,)
    starts: npt.NDArray[np.int64]  # (places + 1,)

    def of(self, place: int) -> npt.NDArray[np.int64]:
        """Returns the examples of one place."""
        return self.examples[self.starts[place] : self.starts[place + 1]]


def random_places(stream: Keystream, *, places: int, size: int, step: int, name: str) -> Places:
    """Returns a place for each of `size` examples, uniformly random and independent of all other examples.

    The place of an example is that of its word among equal intervals of all words: its probability is 1 / `places`
    to 2**-63. At most 2**32 places.
    """
    chosen = intervals(stream.words(size, step=step, name=name), places)
    starts = np.zeros(places + 1, dtype=np.int64)
    np.cumsum(np.bincount(chosen, minlength=places), out=starts[1:])
    return Places(np.argsort(chosen, kind="stable").astype(np.int64), starts)


def intervals(words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    """Returns floor(word count / 2**64): which of `count` equal intervals of all words each is in. At most 2**32."""
    # In two halves: neither product leaves 64 bits.
    number, half = np.uint64(count), np.uint64(32)
    carry = ((words & np.uint64(2**32 - 1)) * number) >> half
    return (((words >> half) * number + carry) >> half).astype(np.int64)


def chosen_indices(
    stream: Keystream, *, count: int, size: int, step: int, name: str
) -> npt.NDArray[np.int64]:  # (count,), ascending
    """Returns a uniformly random choice of `count` of `size` indices, without replacement. At most 2**32 indices.

    The first `count` different ones of a sequence of random indices; of many, the first ones of a random order.
    """
    if 2 * count > size:
        order = shuffled_indices(stream, size=size, step=step, name=name)
        return np.sort(order[:count])
    wanted = count + count // 2 + 16
    while True:
        drawn = intervals(stream.words(wanted, step=step, name=name), size)
        different, first_met = np.unique(drawn, return_index=True)
        if len(different) >= count:
            return np.sort(different[np.argsort(first_met)[:count]])
        wanted *= 2
