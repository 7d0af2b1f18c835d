"""Many equal steps in two stages: blocks of about √n steps on a fine grid, then the blocks on a coarse one.

A spacing h adds h²/6 to the variance of each thing that is put on the grid. For n steps on one grid, h has to be small
beside the deviation of one step, while the window has to hold the deviation of all n steps. Composing blocks of m steps
on a spacing h, and the n/m blocks on a spacing h √m, adds only twice as much, and both windows are smaller by about √m.
Connecting the dots once more keeps the masses of both laws, so δ still can only grow.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privet.accounting.composition import Composition, Tail, Window, good_size, spectrum_of, tail_of, window_for
from privet.accounting.lattice import Lattice

__all__ = ["TooWideError", "block_lattice", "block_size", "refinement"]

Array = NDArray[np.float64]
_FEWEST = 256  # fewer equal steps are composed in one stage
_FACTORS = (0.01, 0.03, 0.06, 0.2, 0.5, 1.0, 1.5)
_LARGEST = 2**21  # losses in the window of a block


class TooWideError(Exception):
    """A block's losses are spread so far that composing it apart saves nothing. `grid_for` handles it."""


def block_size(count: int) -> int:
    """Returns how many of `count` equal steps make a block: a power of two near the root, or 1."""
    return 1 if count < _FEWEST else 2 ** round(math.log2(count) / 2.0)


def refinement(size: int) -> int:
    """Returns how many times finer the grid is on which a block of `size` steps is composed."""
    return max(1, math.isqrt(size))


def block_lattice(fine: Lattice, spacing: float, tilt: float, size: int, log_delta: float) -> Lattice:
    """Returns the composition of `size` steps on the coarse grid, rounded up.

    Args:
        fine: One step, on the grid of `spacing` / `refinement(size)`.
        spacing: The coarse spacing.
        tilt: The tilt at which the block will be composed further; its window is chosen for it.
        size: The number of steps.
        log_delta: log δ: what a block's window may lose is to be far below it.

    Raises:
        TooWideError: if the block's window would be larger than any that is of use.
    """
    ratio, wrapped = refinement(size), max(42.0, 20.0 - log_delta)
    step = spacing / ratio
    tail = tail_of(fine, step, tilt)
    window = window_for([(tail, size)], step, wrapped)
    if window.size > _LARGEST:
        raise TooWideError
    composition = Composition(size=good_size(window.size))
    composition.add(spectrum_of(fine, tail, step, tilt, composition.size), size)
    low = window.low + composition.shift
    mass, rounding = composition.masses(Window(low, composition.size, wrapped))
    losses = step * (low + np.arange(composition.size, dtype=np.float64))
    log_scale = size * tail.log_scale
    with np.errstate(divide="ignore"):
        untilted = np.exp(np.minimum(np.log(np.maximum(mass, 0.0) + rounding) + log_scale - tilt * losses, 0.0))
    if not untilted.any():
        raise TooWideError
    # What lies above the window counts as disclosure, what lies below it is moved up to its bottom.
    above = math.exp(min(log_scale - tilt * float(losses[-1]) - wrapped, 0.0))
    untilted[0] += _below(tail, size, tilt, float(losses[0]), wrapped)
    infinity = -math.expm1(size * math.log1p(-fine.infinity)) if fine.infinity < 1.0 else 1.0
    first, coarse = _spread(low, untilted, step, ratio)
    return Lattice(first, coarse, min(1.0, infinity + above))


def _below(tail: Tail, size: int, tilt: float, loss: float, wrapped: float) -> float:
    """Returns a bound on the probability of a loss below `loss`, without the tilt, by Chernoff's bound."""
    ideal = math.sqrt(2.0 * wrapped / (size * tail.variance + 1e-300))
    # E[e^(uL)] e^(-u loss) for u <= 0 bounds it; moments are known relative to the tilt.
    bounds = (size * tail.log_moment(-ideal * each - tilt) + ideal * each * loss for each in _FACTORS)
    return math.exp(min(0.0, *bounds))


def _spread(low: int, mass: Array, step: float, ratio: int) -> tuple[int, Array]:
    """Returns (first, masses) on the grid that is `ratio` times coarser, the dots connected.

    A mass at loss ℓ between the coarse losses a and b goes to b by the share (1 - e^(a - ℓ)) / (1 - e^(a - b)), so that
    both P and Q keep what they have.
    """
    if ratio == 1:
        return low, mass
    first = low // ratio
    pad = low - first * ratio
    padded = np.zeros(-(-(pad + len(mass)) // ratio) * ratio)
    padded[pad : pad + len(mass)] = mass
    share = np.expm1(-step * np.arange(ratio)) / math.expm1(-step * ratio)
    table = padded.reshape(-1, ratio)
    up = table @ share
    coarse = np.zeros(len(table) + 1)
    coarse[:-1] = np.maximum(table.sum(axis=1) - up, 0.0)
    coarse[1:] += up
    return first, coarse
