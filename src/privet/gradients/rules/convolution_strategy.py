"""Which way to the norms of a convolution's per-example gradients is cheapest: a cost model over shapes.

Costs are relative to the plain weight gradient of the whole batch. The constants were measured on two AVX-512 cores
with float32; a wrong guess costs time and nothing else.
"""

from __future__ import annotations

import math
from enum import Enum

from privet.gradients.rules.gram import NARROW, gram_padding
from privet.gradients.rules.patches import Pairing
from privet.gradients.rules.strategy import ROWS_BYTES
from privet.gradients.tracing import tracing

__all__ = ["ConvolutionStrategy", "convolution_strategy"]


class ConvolutionStrategy(Enum):
    """How the norms are found."""

    ROWS = "patches copied out, a matrix product for each row, kept for the weighted sum"
    PIXELS = "Gram matrices of pixels and of the field, then an ordinary weight gradient"
    TILES = "rows instantiated a few at a time, for the norm alone, then an ordinary weight gradient"


def convolution_strategy(pairing: Pairing, *, budget: int = ROWS_BYTES) -> ConvolutionStrategy:
    """Returns the cheapest way for this shape that fits the budget of bytes."""
    channels, outputs = pairing.source.shape[1], pairing.field.shape[1]
    places, depth = max(pairing.places, 1), pairing.depth
    size = pairing.rows * outputs * depth * pairing.source.element_size()
    costs: dict[ConvolutionStrategy, float] = {}
    if size <= budget:
        turned = 0.15 if pairing.pixels_first and pairing.source.is_contiguous() else 0.0
        costs[ConvolutionStrategy.ROWS] = 1 + 25 / outputs + (35 if size > 32e6 else 15) / places + turned
    else:
        costs[ConvolutionStrategy.TILES] = 2.2 + 25 / outputs + 35 / places
    if _gram_is_precise(pairing):
        pixels = math.prod(pairing.padded)
        shifts = 25 * sum(pairing.kernel) * (pixels * places + places**2)
        work = pixels**2 * channels + places**2 * outputs + shifts
        if pairing.rows * pixels**2 * pairing.source.element_size() <= ROWS_BYTES:  # working memory, not kept
            costs[ConvolutionStrategy.PIXELS] = 1.1 + work / (places * depth * outputs)
    return min(costs, key=lambda strategy: costs[strategy])


def _gram_is_precise(pairing: Pairing) -> bool:
    """Returns whether the bound on a Gram norm's rounding error is likely to be narrow enough to be of use."""
    if tracing() or pairing.groups != 1 or not pairing.places or not pairing.rows or pairing.source.dtype.itemsize < 4:
        return False
    length = max(pairing.source.shape[1] * max(pairing.kernel), pairing.field.shape[1])
    source = pairing.source
    return gram_padding(length, source.dtype, source.device, kind="convolution") * pairing.places < NARROW
