"""The true ε of a point, as near as the tests' oracle decides it in a few evaluations."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["enclosed"]

_NEAR = 3e-7  # relative: how near to the estimate of ε the two proofs are sought
_SECONDS = 8.0


def enclosed(question: dict[str, Any], near: float) -> dict[str, float]:
    """Returns `lower` < true ε <= `epsilon`, sought around `near`; 0 and infinity where the oracle decided nothing.

    Each evaluation of the oracle at an ε proves that the truth is above it or that it is not. Two or three secants on
    log δ lead to the truth; at last it is asked a little below and a little above.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "accounting"))
    from oracle import delta as delta_at

    from privet.accounting import GaussianEvent, PoissonEvent, SelfComposedEvent

    event = SelfComposedEvent(PoissonEvent(question["rate"], GaussianEvent(question["sigma"])), question["steps"])
    target = question["delta"]
    low, high, started = 0.0, math.inf, time.process_time()
    logs: list[tuple[float, float]] = []

    def ask(at: float) -> bool:
        nonlocal low, high
        found = delta_at(event, at)
        if found.low > target:
            low = max(low, at)
        if found.high <= target:
            high = min(high, at)
        if found.low > 0.0:
            logs.append((at, math.log(found.low / target)))
        return found.low > target or found.high <= target

    known = ask(near)
    if known and near > 0.0 and not (near == high and math.isinf(low)):
        at = near * (1.0 - 1e-3) if high == near else near * (1.0 + 1e-3)
        for _ in range(8):
            if time.process_time() - started > _SECONDS or high - low <= 4.0 * _NEAR * high:
                break
            ask(max(at, 0.0))
            if len(logs) < 2 or logs[-1][0] == logs[-2][0]:
                break
            (first, a), (second, b) = logs[-2:]
            root = second - b * (second - first) / (b - a) if a != b else second
            if high < root or root < low:
                root = (low + min(high, 2.0 * low + 1e-9)) / 2.0
            # Once the estimate stands, it is proven from the side that is still open.
            settled = abs(root - second) <= 1e-5 * abs(root)
            at = (
                root
                if not settled
                else root * (1.0 - _NEAR)
                if low < root * (1.0 - 2 * _NEAR)
                else root * (1.0 + _NEAR)
            )
    return {"lower": low, "epsilon": high}
