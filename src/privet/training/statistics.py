"""What a step's clipping did: for the eyes of those who hold the data, since none of it has noise.

Off unless it is asked for. To ask puts a mark on the ledger, which privacy reports show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch

from privet._checks import check_probability
from privet.gradients.clipped_sum import ClippedSum
from privet.mechanism import Mechanism

__all__ = ["STATISTICS_MARK", "Logger", "Statistics", "StepStatistics"]

STATISTICS_MARK = "statistics without noise were collected"


@dataclass(frozen=True)
class StepStatistics:
    """What clipping did in one logical step. NOT PRIVATE: every number tells something of the batch, without noise.

    Attributes:
        step: the number of the logical step, from 0.
        model: which private model of the engine, from 0.
        examples: how many were in the batch; of this process alone, where several train together.
        dropped: how many had a gradient that is not finite, and weighed nothing.
        clipped: the fraction of the others whose gradient was made shorter; 0 for an empty batch.
        clip_norm: the sensitivity that they were clipped to, which is public.
        norms: quantiles of the norms of gradients before clipping, by their levels; NaN for an empty batch.
    """

    step: int
    model: int
    examples: int
    dropped: int
    clipped: float
    clip_norm: float
    norms: Mapping[float, float]


Logger = Callable[[StepStatistics], None]


@final
class Statistics:
    """Collects the statistics of each logical step, keeps those of the last, and hands them to loggers.

    Args:
        quantiles: the levels of the quantiles of norms.
        loggers: each is called with the statistics of every logical step, once its gradient is released.

    Attributes:
        latest: of the last logical step; None before the first. NOT PRIVATE.
    """

    def __init__(self, *, quantiles: Sequence[float], loggers: Sequence[Logger]) -> None:
        self._quantiles = tuple(check_probability("a quantile", level) for level in quantiles)
        self._loggers = tuple(loggers)
        self.latest: StepStatistics | None = None

    def of_model(self, model: int) -> Callable[[ClippedSum, Mechanism, int], None]:
        """Returns what looks at each sum of one model."""

        def look(clipped: ClippedSum, mechanism: Mechanism, step: int) -> None:
            self.latest = self._found(clipped, mechanism, step=step, model=model)
            for logger in self._loggers:
                logger(self.latest)

        return look

    @torch.no_grad()
    def _found(self, clipped: ClippedSum, mechanism: Mechanism, *, step: int, model: int) -> StepStatistics:
        squared = clipped.statistics["norms"]  # (K, B)
        finite = squared[:, squared.isfinite().all(0)]
        norms = finite.sum(0).sqrt().double().cpu()
        shorter = (mechanism.clipping.weights(finite) < 1.0).any(0)
        levels = torch.tensor(self._quantiles, dtype=torch.float64)
        found = norms.quantile(levels).tolist() if len(norms) else [math.nan] * len(levels)
        return StepStatistics(
            step=step,
            model=model,
            examples=squared.shape[-1],
            dropped=int(clipped.statistics["dropped"]),
            clipped=float(shorter.double().mean()) if len(norms) else 0.0,
            clip_norm=mechanism.clipping.sensitivity,
            norms=dict(zip(self._quantiles, found, strict=True)),
        )
