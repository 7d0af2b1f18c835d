"""Which formula is cheapest here: counts of operations and bytes, with constants that were measured.

Several formulas give the same norm, and which is fastest depends on shape and machine by more than a factor of ten.
Nothing here changes a result beyond rounding, so nothing here can change a guarantee.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import Tensor, nn

from privet.gradients.rules.gram import NARROW, gram_padding
from privet.gradients.tracing import tracing

__all__ = ["ROWS_BYTES", "Strategy", "linear_strategy", "prefers_channels_last", "row_chunks"]

ROWS_BYTES = 160 * 2**20
"""Per-example gradients of one parameter above this many bytes are not kept from the norm to the weighted sum."""

_CHUNK_BYTES = 16 * 2**20


class Strategy(Enum):
    """How the norms of per-example gradients `left^T right` are found."""

    GRAM = "Gram matrices over positions"
    ROWS = "gradients instantiated once, kept for the weighted sum"
    TILES = "gradients instantiated a few examples at a time, for the norm alone"


def linear_strategy(left: Tensor, right: Tensor, *, budget: int = ROWS_BYTES) -> Strategy:  # (B, T, O), (B, T, I)
    """Returns the cheapest way to the norms of `left_i^T right_i` that keeps no more bytes than the budget.

    A Gram norm may have to be found again in another way, which a traced graph cannot decide.
    """
    examples, positions, outputs = left.shape
    inputs = right.shape[2]
    size = examples * outputs * inputs * left.element_size()
    wide_enough = 16.0 if size < 32 * 2**20 else 60.0
    if left.is_cuda:
        wide_enough = float(positions)  # T < dp / (d + p): both are compute-bound there
    precise = gram_padding(max(outputs, inputs), left.dtype, left.device) * positions < NARROW
    if precise and not tracing() and positions**2 * (outputs + inputs) < wide_enough * outputs * inputs:
        return Strategy.GRAM
    return Strategy.ROWS if size <= min(budget, ROWS_BYTES) else Strategy.TILES


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Yields slices of the rows that hold about 16 MiB each, at least one row."""
    step = max(1, _CHUNK_BYTES // max(bytes_per_row, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def prefers_channels_last(module: nn.Module) -> bool:
    """Returns whether 2-D convolutions of this network are faster with the channels innermost.

    On a CPU pooling and narrow convolutions are; group normalisation is not, and loses accuracy there.
    """
    kinds = {type(child) for child in module.modules()}
    if nn.Conv2d not in kinds or kinds & {nn.GroupNorm, nn.InstanceNorm2d}:
        return False
    return all(p.device.type == "cpu" and p.dtype == torch.float32 for p in module.parameters())
