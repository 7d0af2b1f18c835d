"""A logical batch taken one physical batch after the other: less memory, and the same sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privet.batches.cut import cut_rows
from privet.batches.out_of_memory import is_out_of_memory
from privet.gradients.clipped_sum import ClippedSum
from privet.sampling.physical import PhysicalSize, stop_of

__all__ = ["summed_by_parts"]


def summed_by_parts(
    batch: Any,
    examples: int,
    part: Callable[[Any, int, int], tuple[Tensor, ClippedSum]],
    *,
    least: int,
    size: PhysicalSize,
    owner: npt.NDArray[np.int64] | None,
) -> tuple[Tensor, ClippedSum]:
    """Returns the losses and the clipped sum of a logical batch.

    Args:
        batch: the logical batch.
        examples: its number of rows.
        part: `part(rows, start, stop)` returns the losses and the sum of the rows from `start` on.
        least: how many parts there are at least, 1 or more: where every forward needs all ranks, a rank goes along with
            one that has more.
        size: of a physical batch. It is halved where memory runs out, if it is "auto".
        owner: (examples,), the user of each row, all of whose rows are in one part; None where a row is a unit.

    Raises:
        OutOfMemoryError: if not even a single example fits.
    """
    losses: list[Tensor] = []
    total: ClippedSum | None = None
    start, taken = 0, 0
    while start < examples or taken < least:
        stop = stop_of(start, examples, most=size.most or examples, owner=owner)
        rows, done = stop - start, None
        try:
            chosen = batch if rows == examples else cut_rows(batch, start, stop, examples=examples)
            done = part(chosen, start, stop)
        except Exception as error:
            if not size.auto or not is_out_of_memory(error):
                raise
            size.halve(rows, error)
        if done is None:  # tried again out here, where the failed attempt is let go of
            size.free()
            continue
        losses.append(done[0])
        total = done[1] if total is None else total.add(done[1])
        start, taken = start + rows, taken + 1
    assert total is not None
    return losses[0] if len(losses) == 1 else torch.cat(losses), total
