"""What is asked of a grid: where on the curve, in each direction, and how much the grid may add."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.accounting.moments import Law

__all__ = ["CUTS", "MOST_CELLS", "Goal", "Place", "added", "finest"]

Array = NDArray[np.float64]
MOST_CELLS = 2**18  # of one step on a grid
CUTS = (2e-5, 3e-3, 2e-2)
"""How much of δ may be cut off the tails. Where losses are rare a larger cut is worth more than it costs: the losses
that are left ask for a steeper tilt and a smaller window. Laws leave out as much, or they would be of other losses."""


@dataclass(frozen=True)
class Place:
    """Where one direction is composed: the tilt, the ε that it aims at, and how steeply log δ falls there.

    The tilt is for the rounding of the transforms, the slope for the spacing. Where losses have exponential tails the
    two are the same; where they are rare and heavy the curve is flatter than the saddle point says. Losses above
    `split` are then composed apart from the others, without a tilt, and blocks of the others at `usual_tilt`.
    """

    tilt: float
    epsilon: float
    slope: float
    split: float = math.inf
    usual_tilt: float = 0.0


@dataclass(frozen=True)
class Goal:
    """The question: log δ, where in each direction, and how much the grid may add: to ε, relative, or to log δ."""

    log_delta: float
    places: tuple[Place, ...]
    tolerance: float
    log_tolerance: float = 0.0
    cut: float = CUTS[0]
    below: bool = False
    one_stage: bool = False

    @property
    def epsilon(self) -> float:
        """The largest ε aimed at."""
        return max(place.epsilon for place in self.places)

    @property
    def in_blocks(self) -> bool:
        """Whether many equal steps are composed in two stages; blocks are only rounded up."""
        return not self.below and not self.one_stage

    @property
    def splits(self) -> bool:
        """Whether rare heavy losses are composed apart in some direction."""
        return not self.below and any(math.isfinite(place.split) for place in self.places)

    def allowed(self, place: Place) -> float:
        """Returns how much the grid may add to ε in one direction: more in one whose ε is not the largest."""
        sought = max(self.tolerance * max(place.epsilon, 1e-7), self.log_tolerance / max(place.slope, 1e-300))
        return sought + 0.1 * (self.epsilon - place.epsilon)


def added(law: Law, place: Place, goal: Goal, spacings: Array, widest: float) -> Array:
    """Returns about how much each spacing adds to ε: half of the variance that it adds, times how steep log δ falls.

    Around the mean of the losses, where δ is near 1, log δ is flat but bent, at the scale of the deviation.
    """
    variance = law.added(place.tilt, spacings, finest=np.asarray(finest(goal, spacings, widest)))
    if math.isfinite(place.split):
        # Of the rare loss that decides, too.
        return place.slope / 2.0 * (variance + spacings**2 / 6.0)
    return max(place.slope, law.steepness(place.tilt)) / 2.0 * variance


def finest(goal: Goal, spacing: float | Array, widest: float) -> float | Array:
    """Returns how many times finer than the grid that of a block may be: it has to hold all losses of a step."""
    if not goal.in_blocks:
        return 1.0 + 0.0 * spacing
    # Beside a split the other direction has a tilt that cuts its losses short.
    return MOST_CELLS / min(widest, *(place.split for place in goal.places)) * spacing
