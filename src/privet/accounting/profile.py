"""δ(ε) of one composed direction, read off a window of tilted masses: nothing outside of the window is forgotten.

The composed loss is known by its tilted mass on a window. Three parts of it make up δ(ε), the mean of
(1 - e^(ε - loss)) over the losses above ε:

* inside the window: a sum over the masses, with the tilt undone;
* above the window, and at plus infinity: at most e^-27 (`Window.wrapped`) of the tilted mass, whose untilted weight is
  largest at the window's top;
* below the window but above ε, where ε lies below the window: at most e^-27 of the tilted mass, whose untilted weight
  is largest at ε.

`delta` adds all three, and `epsilon` is the inverse of that same function: an answer below the window is never read
off the window alone, and `Answer.inside` says whether the window held it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.accounting.composition import Window

__all__ = ["Answer", "Frame", "Profile"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """An upper bound on ε at a δ, and how good the window was for it.

    `slope` is -d log δ / dε there. `lost` is the share of δ that is not a mass of the window: rounding, cut tails and
    what lies outside.
    """

    epsilon: float
    inside: bool
    slope: float
    lost: float


class Frame:
    """A window's positive losses and the weights that undo the tilt there: what outlives a question."""

    def __init__(self, window: Window, *, step: float, tilt: float, reference: float) -> None:
        self.window, self.tilt, self.reference = window, tilt, reference
        # Only positive losses matter for ε >= 0; those so far below the reference that weights overflow set the floor.
        self.floor = max(0.0, reference - 600.0 / (tilt + 1.0))
        self.bottom = step * window.low
        self.top = step * (window.low + window.size - 1)
        self.skip = min(max(0, math.ceil(self.floor / step) - window.low), window.size - 1)
        self.losses = step * (window.low + self.skip + np.arange(window.size - self.skip, dtype=np.float64))
        distance = self.losses - reference
        # A window that lies below the floor as a whole has no loss that counts.
        self.weights = np.where(self.losses < self.floor, 0.0, np.exp(np.clip(-tilt * distance, -745.0, 690.0)))
        self.rising = np.exp(np.clip(distance, -690.0, 690.0))
        self.falling = 1.0 / self.rising


class Profile:
    """δ(ε) of one composed direction, rounded up; or, with `below`, rounded down.

    Args:
        frame: The window and its weights.
        mass: The tilted mass at each loss of the window, from its lowest on.
        rounding: What rounding may have added to or taken from each of them.
        log_scale: log of the factor that the tilt divided the masses by.
        infinity: The mass at plus infinity.
        offset: How much is to be added to every loss of the window.
        below: Whether δ is rounded down: masses less their rounding, nothing outside of the window.
        rest: Returns what is to be added to δ at an ε: a part of the composition that the masses leave out.
    """

    def __init__(
        self,
        frame: Frame,
        mass: Array,
        rounding: float,
        *,
        log_scale: float,
        infinity: float,
        offset: float = 0.0,
        below: bool = False,
        rest: Callable[[float], float] | None = None,
    ) -> None:
        self._frame, self._losses = frame, frame.losses
        self._log_scale = log_scale - frame.tilt * frame.reference
        self._infinity, self._offset, self._below = float(infinity), offset, below
        self._rounding, self._rest = float(rounding), rest
        self._mass = mass[frame.skip :]
        kept = np.maximum(self._mass - rounding, 0.0) if below else np.maximum(self._mass, 0.0) + rounding
        self._weighted = frame.weights * kept
        self._sums: tuple[Array, Array] | None = None

    # -- δ of ε ------------------------------------------------------------------------------------------------------

    def delta(self, epsilon: float) -> float:
        """Returns a bound on δ at ε: from above, or from below where the profile is one that is rounded down."""
        epsilon -= self._offset
        inside = self._inside(epsilon)
        if self._below:
            # What wrapped around the circle is in some mass of the window, with a weight of at most that at ε.
            return max(0.0, inside * (1.0 - 1e-12) - self._outside(max(epsilon, self._frame.floor)) * 2.0)
        if epsilon < self._frame.floor:
            return 1.0
        above = self._outside(max(self._frame.top, epsilon))
        between = self._outside(epsilon) if epsilon < self._frame.bottom else 0.0
        rest = self._rest(epsilon) if self._rest else 0.0
        return min(1.0, self._infinity + above + between + rest + inside * (1.0 + 1e-12))

    def _outside(self, loss: float) -> float:
        """Returns the most that e^-wrapped of the tilted mass weighs without the tilt, at losses of at least `loss`."""
        exponent = self._log_scale - self._frame.tilt * (loss - self._frame.reference) - self._frame.window.wrapped
        return math.exp(min(exponent, 0.0))

    def _inside(self, epsilon: float) -> float:
        k = int(np.searchsorted(self._losses, epsilon, side="right"))
        value = float(self._weighted[k:] @ -np.expm1(np.maximum(epsilon - self._losses[k:], -745.0)))
        return math.exp(min(self._log_scale + math.log(value), 0.0)) if value > 0.0 else 0.0

    # -- ε of δ ------------------------------------------------------------------------------------------------------

    def answer(self, delta: float) -> Answer:
        """Returns the least ε >= 0 at which `delta` is at most this, infinity if more than δ is at infinity.

        Certificate: the ε that is returned is put into `delta` again, which accounts for the mass below the window,
        inside and above; where that gives more than δ, or the window did not hold the answer, a larger ε is returned
        that passes, and `inside` is false.
        """
        frame = self._frame
        if delta <= self._infinity:
            return Answer(math.inf, inside=False, slope=1.0, lost=1.0)
        # What the masses leave out falls with ε, and the answer is not expected far below the reference.
        rest = self._rest(0.95 * frame.reference) if self._rest else 0.0
        target = delta - self._infinity - self._outside(frame.top) - rest
        epsilon, slope, share, inside = self._solve(target)
        if not inside:
            # Above the window only what lies outside counts, and that falls like e^-λε.
            needed = self._log_scale - frame.window.wrapped - math.log(delta - self._infinity)
            above = max(frame.top, frame.floor, frame.reference + needed / max(frame.tilt, 1e-300))
            epsilon = above if target <= 0.0 or math.isinf(epsilon) else epsilon
        if math.isinf(epsilon):
            return Answer(math.inf, inside=False, slope=1.0, lost=1.0)
        epsilon *= 1.0 + 1e-12
        if self.delta(epsilon + self._offset) > delta * (1.0 + 1e-9):
            inside, epsilon = False, self._raised(epsilon, delta)
        lost = min(1.0, (delta - target) / delta + share)
        return Answer(max(0.0, epsilon + self._offset), inside=inside, slope=slope, lost=lost)

    def _raised(self, epsilon: float, delta: float) -> float:
        """Returns a larger ε that passes: doubled until it does, then halved back."""
        low, high = epsilon, max(2.0 * epsilon, 1e-6)
        for _ in range(1100):
            if self.delta(high + self._offset) <= delta or math.isinf(high):
                break
            low, high = high, 2.0 * high
        if math.isinf(high):
            return math.inf
        for _ in range(60):
            middle = low + (high - low) / 2.0
            low, high = (low, middle) if self.delta(middle + self._offset) <= delta else (middle, high)
        return high

    def epsilon_below(self, delta: float) -> float:
        """Returns a lower bound on the least ε >= 0 with at most δ, of a profile that is rounded down."""
        wrapped = self._outside(max(self._frame.bottom, self._frame.floor, 0.0)) * 2.0
        # A first answer without what wrapped around, whose weight at that answer is then known.
        epsilon = self._solve(delta * (1.0 + 1e-9))[0]
        for _ in range(2):
            if not math.isfinite(epsilon):
                return 0.0
            wrapped = min(wrapped, self._outside(max(epsilon * 0.98, self._frame.floor)) * 2.0)
            epsilon = self._solve((delta + wrapped) * (1.0 + 1e-9))[0]
        return max(0.0, epsilon * (1.0 - 1e-12) + self._offset) if self._certain(epsilon, delta) else 0.0

    def _certain(self, epsilon: float, delta: float) -> bool:
        """Whether δ just below ε is indeed above `delta`."""
        return math.isfinite(epsilon) and self.delta(epsilon * (1.0 - 1e-9) - 1e-15 + self._offset) > delta * (1 - 1e-9)

    def _solve(self, delta: float) -> tuple[float, float, float, bool]:
        """Returns (ε, slope, share of rounding, whether the window holds ε) for the part of δ inside the window.

        δ at ε between two losses is A - e^ε B with sums over the losses above: find the cell, then solve for ε.
        """
        frame = self._frame
        if delta <= 0.0 or math.log(delta) - self._log_scale < -690.0:
            return math.inf, 1.0, 1.0, False
        target = math.exp(min(math.log(delta) - self._log_scale, 690.0))
        if self._sums is None:
            self._sums = (_sums(self._weighted) * (1.0 + 1e-13), _sums(self._weighted * frame.falling))
        sums, falling = self._sums
        at_losses = sums - frame.rising * falling
        k = int(np.argmax(at_losses <= target))
        if at_losses[k] > target:
            return math.inf, 1.0, 1.0, False
        excess = float(sums[k]) - target
        epsilon = frame.reference + math.log(excess / float(falling[k])) if excess > 0.0 else -math.inf
        before = float(self._losses[k - 1]) if k > 0 else -math.inf
        epsilon = max(frame.floor, min(max(epsilon, before), float(self._losses[k])))
        # Below the lowest loss of the window nothing is known from the window: the lowest loss is the answer then.
        inside = k > 0 or frame.bottom <= 0.0
        if not inside:
            epsilon = float(self._losses[0])
        slope = float(falling[k]) * math.exp(min(max(epsilon - frame.reference, -690.0), 690.0)) / target
        share = self._rounding * float(frame.weights[k:].sum()) / target
        return epsilon, slope, share, inside


def _sums(values: Array) -> Array:
    """Returns the sum from each entry to the last."""
    result: Array = np.cumsum(values[::-1])[::-1]
    return result
