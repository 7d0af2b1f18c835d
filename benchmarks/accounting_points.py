"""The questions of the accounting benchmark: points of the grid, calibrations, and some single questions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from random import Random

__all__ = ["CALIBRATIONS", "SINGLE", "Point", "points"]

SIGMA, RATE, STEPS, DELTA = (0.3, 50.0), (1e-7, 1.0), (1, 10**7), (1e-12, 0.1)


@dataclass(frozen=True)
class Point:
    """One Poisson mechanism, composed with itself, and the δ at which its ε is asked for."""

    group: str
    sigma: float
    rate: float
    steps: int
    delta: float

    def row(self) -> dict[str, object]:
        """Returns the point as JSON holds it."""
        return asdict(self)


# Rare, heavy losses: a step almost never touches a record, and discloses much when it does. They are hard for a grid.
RARE = (
    (0.5, 1e-6, 10**6, 1e-6),
    (0.5, 1e-6, 10**5, 1e-6),
    (1.4236, 4.3e-5, 1, 1.05e-12),
    (0.485, 1.48e-6, 103_417, 5.8e-8),
    (0.8, 1e-5, 1, 1e-12),
    (0.7, 1e-5, 10**5, 1e-8),
    (0.7, 1e-4, 10**4, 1e-6),
)
# target ε, rate, steps, δ
CALIBRATIONS = (
    (8.0, 0.01, 10**4, 1e-5),
    (1.0, 0.01, 10**4, 1e-5),
    (2.0, 1e-3, 10**5, 1e-6),
    (0.1, 1e-5, 10**5, 1e-6),
    (0.0917, 1.19e-4, 2670, 6.85e-8),
    (3.0, 0.1, 1000, 1e-5),
    (1.0, 0.5, 100, 1e-5),
    (4.0, 1.0, 100, 1e-6),
    (0.5, 0.02, 3000, 1e-5),
    (1.0, 1e-3, 10**6, 1e-8),
    (10.0, 0.2, 5000, 1e-7),
    (0.5, 1e-4, 10**7, 1e-9),
)
# name: what it is; the words are those of the table
SINGLE = {
    "gdp": "a covering μ: ε of the gdp accountant at σ = 1, q = 0.01, T = 10,000, δ = 1e-5",
    "gdp_long": "the same at T = 10,000,000",
    "schedule": "ε of 300 steps, each with another σ (1 to 2.5), q = 0.01, δ = 1e-5",
    "one_more": "one more step on a running ledger of 10,000, and its ε",
}


def points(seed: int) -> list[Point]:
    """Returns the grid: one well-known point, rare heavy losses, all corners of the box, and 36 random points.

    Random points are log-uniform in the box. In half of it or more, ε is 0 or far above anything that protects; so 14
    points are drawn from the whole box and 22 from where a Gaussian of the same variance costs between 0.01 and 30.
    """
    found = [Point("readme", 1.0, 0.01, 10**4, 1e-5)]
    found += [Point("rare", *each) for each in RARE]
    found += [Point("corner", s, q, t, d) for s in SIGMA for q in RATE for t in STEPS for d in DELTA]
    random = Random(seed)  # noqa: S311  points to measure, no secrets
    found += [_drawn(random, "anywhere") for _ in range(14)]
    while sum(each.group == "of use" for each in found) < 22:
        point = _drawn(random, "of use")
        mu = point.rate * math.sqrt(point.steps) / point.sigma
        if 0.01 < mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / point.delta)) < 30 and point.delta < 1e-3:
            found.append(point)
    return found


def _drawn(random: Random, group: str) -> Point:
    def log_uniform(low: float, high: float) -> float:
        return float(f"{math.exp(random.uniform(math.log(low), math.log(high))):.4g}")

    return Point(group, log_uniform(*SIGMA), log_uniform(*RATE), round(log_uniform(*STEPS)), log_uniform(*DELTA))
