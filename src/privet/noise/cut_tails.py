"""What the cut tails of the noise cost: a δ that no accountant knows of, and that can be added to the reported one.

Box-Muller makes values in pairs, and cuts each pair to a disc of radius c (`LARGEST_RADIUS`): no two values of a pair
lie outside it. A neighbor moves the discs. Where a moved disc covers what the other does not, an observer is certain.

One pair, moved by `a` standard deviations, leaves the disc with probability m(a). The noise that flows over the edge
gives m'(t) = (c/2π) e^(-c²/2) ∫ cos θ e^(tc cos θ - t²/2) dθ, over the angles with cos θ > t/2c. The integral is at
most 2 e^(g(t)), where g(t) = tc - t²/2 and g'(t) >= c - a up to a. So with K = (c/π) e^(-c²/2), for a < c,

    m(a) = K a + O(a²)   and   m(a) <= M(a) = K (e^(g(a)) - 1) / (c - a).

All pairs: the sum of a_i² is at most A² = (shift / noise multiplier)². (M(a) - K a) / a² does not fall up to c - 1, so
the part of M above K a is largest in a single pair. The sum of K a_i is at most K √n A over n pairs. Together

    δ <= K (√n - 1) A + M(A)   for each participation, and the sum of that over steps.
"""

from __future__ import annotations

import math

from privet._checks import check_count, check_positive, check_probability
from privet.noise.boxmuller import LARGEST_RADIUS

__all__ = ["cut_tail_delta"]


def cut_tail_delta(
    dimension: int, noise_multiplier: float, *, steps: int = 1, rate: float = 1.0, shift: float = 1.0
) -> float:
    """Returns an upper bound on the δ that the cut tails of Gaussian noise add to that of ideal noise, at any ε.

    It is not part of what accountants and ledgers report. Add it to a δ that is so small that it matters.

        >>> f"{cut_tail_delta(10**9, 1.0):.1e}", f"{cut_tail_delta(10**6, 1.0, steps=10_000, rate=0.01):.1e}"
        ('6.9e-12', '3.4e-11')

    Args:
        dimension: how many values are released in a step. A tensor of an odd number of values counts as one value more.
        noise_multiplier: the standard deviation of the noise over the sensitivity.
        steps: the number of steps.
        rate: the probability that an example takes part in a step.
        shift: how far a neighbor moves the sum, in sensitivities: 1 under add-or-remove-one and zero-out, 2 under
            replace-one, times the size of the group.

    Returns:
        At most 1; and 1 where one step moves a pair by more than `LARGEST_RADIUS` - 1 standard deviations.

    Raises:
        ConfigurationError: if a number is out of its range.
    """
    pairs = (check_count("dimension", dimension, 1) + 1) // 2
    moved = check_positive("shift", shift) / check_positive("noise_multiplier", noise_multiplier)
    participations = check_count("steps", steps) * check_probability("rate", rate)
    return min(1.0, participations * _escaped(pairs, moved, LARGEST_RADIUS)) if participations else 0.0


def _escaped(pairs: int, moved: float, radius: float) -> float:
    """Returns a bound on the probability that any pair leaves its disc, where all are moved by `moved` in norm."""
    if moved > radius - 1.0:
        return 1.0
    edge = radius / math.pi * math.exp(-(radius**2) / 2.0)
    single = edge * math.expm1(moved * radius - moved**2 / 2.0) / (radius - moved)
    # What is left of each pair is scaled up by what was cut of it.
    return (edge * (math.sqrt(pairs) - 1.0) * moved + single) / -math.expm1(-(radius**2) / 2.0)
