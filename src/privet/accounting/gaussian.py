"""The Gaussian mechanism in closed form: δ of ε, ε of δ and μ of (ε, δ) for N(μ, 1) against N(0, 1).

Balle and Wang, arXiv 1805.06530, theorem 8; Dong, Roth and Su, arXiv 1905.02383, corollary 2.13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from privet.accounting import _special as special

__all__ = [
    "bisected",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_log_delta",
    "gaussian_mu",
    "smallest_mu",
]

_MOST_DELTA = 1.0 - 1e-6
_SLACK = 1e-12  # relative; every result is rounded toward less privacy by this much


def gaussian_log_delta(mu: float, epsilon: float) -> float:
    """Returns log δ of the Gaussian mechanism with shift μ: δ = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ)."""
    if mu == 0.0:
        return -math.inf if epsilon >= 0.0 else math.log(-math.expm1(epsilon))
    if math.isinf(mu) or epsilon == -math.inf:
        return 0.0
    if math.isinf(epsilon):
        return -math.inf
    upper, lower = epsilon / mu - mu / 2.0, epsilon / mu + mu / 2.0
    if upper > 1e100:
        return -math.inf  # its square is beyond float64, and δ far below the least of it
    if upper > 1.0:
        # Both terms are φ(upper) times a Mills ratio, since e^ε φ(lower) = φ(upper): no underflow, less cancellation.
        left, right = upper / math.sqrt(2.0), lower / math.sqrt(2.0)
        ratio = float(special.erfcx(left) - special.erfcx(right))
        if mu < 1e-6 or ratio <= 0.0:
            # The difference would be rounding; |erfcx'(x)| <= 2 / (√π (2x² + 1)) bounds it from above.
            ratio = (right - left) * 2.0 / (math.sqrt(math.pi) * (2.0 * left**2 + 1.0))
        return math.log(ratio / 2.0) - upper**2 / 2.0 if ratio > 0.0 else -math.inf
    if epsilon > 700.0:
        first, second = float(special.log_ndtr(-upper)), epsilon + float(special.log_ndtr(-lower))
        return first + math.log(max(-math.expm1(min(second - first, 0.0)), 1e-16))
    difference = float(special.ndtr(-upper)) - math.exp(epsilon) * float(special.ndtr(-lower))
    # Where the difference is nothing but rounding, δ(0) <= 0.4 μ still bounds it.
    return math.log(difference if difference > 0.0 else 0.4 * mu)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Returns δ at ε of the Gaussian mechanism with shift μ, rounded up."""
    return min(1.0, math.exp(gaussian_log_delta(mu, epsilon)) * (1.0 + _SLACK))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Returns the smallest ε >= 0 at which the Gaussian mechanism with shift μ has at most δ, rounded up."""
    if mu == 0.0 or delta >= 1.0:
        return 0.0
    if math.isinf(mu) or delta <= 0.0:
        return math.inf
    target = math.log(delta) - _SLACK
    if gaussian_log_delta(mu, 0.0) <= target:
        return 0.0
    # δ <= Φ(μ/2 - ε/μ) <= exp(-(ε/μ - μ/2)²/2), so this end is certainly private enough.
    high = mu * (mu / 2.0 + math.sqrt(2.0 * -target)) + mu
    return bisected(lambda epsilon: gaussian_log_delta(mu, epsilon) <= target, 0.0, high)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Returns the smallest μ whose δ at ε reaches `delta`, rounded up: the Gaussian that just covers (ε, δ)."""
    if delta <= 0.0:
        return 0.0
    if delta >= 1.0:
        return math.inf
    target = math.log(delta)
    high = 1.0
    while gaussian_log_delta(high, epsilon) < target:
        high *= 2.0
    return bisected(lambda mu: gaussian_log_delta(mu, epsilon) >= target, 0.0, high)


def bisected(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Returns a number at which `holds` is true, next to one where it is not; it must hold at `high`."""
    for _ in range(200):
        middle = low + (high - low) / 2.0
        if middle in {low, high} or high - low <= _SLACK * high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def smallest_mu(delta: Callable[[float], float], highest: float, *, tolerance: float = 5e-4) -> float:
    """Returns a μ whose Gaussian lies above δ(ε) for 0 <= ε <= highest, and within `tolerance` of the smallest.

    Between two points of the curve δ lies below their chord in e^ε, since it is convex there. A stretch is split
    until the Gaussian lies above its chord, checked piece by piece with the chord's left and the Gaussian's right end.
    Nearer to 1 than 1e-6 δ may be known as 1 only, and no finite μ covers that: there the claim ends.
    """
    if highest <= 0.0:
        return gaussian_mu(0.0, min(delta(0.0), _MOST_DELTA)) * (1.0 + tolerance)
    ends = [highest * index / 16.0 for index in range(17)]
    points = [(end, delta(end)) for end in ends]
    reached = max(gaussian_mu(at, min(value, _MOST_DELTA)) for at, value in points)
    waiting, closed = list(itertools.pairwise(points)), []
    for _ in range(5_000):
        if not waiting or math.isinf(reached):
            break
        (a, at_a), (b, at_b) = waiting.pop()
        if _covers(reached * (1.0 + tolerance), a, at_a, b, at_b):
            continue
        if b - a <= 1e-6 * highest:
            closed.append(((a, at_a), (b, at_b)))
            continue
        middle = (a + b) / 2.0
        point = (middle, delta(middle))
        reached = max(reached, gaussian_mu(middle, min(point[1], _MOST_DELTA)))
        waiting += [((a, at_a), point), (point, (b, at_b))]
    # A stretch that would not close in time is covered by its own two ends.
    left = [gaussian_mu(b, min(at_a, _MOST_DELTA)) for (_, at_a), (b, _) in waiting + closed]
    return max([reached * (1.0 + tolerance), *left])


def _covers(mu: float, a: float, at_a: float, b: float, at_b: float) -> bool:
    """Whether the Gaussian with shift μ lies above the chord between two points of a curve."""
    if at_a <= 0.0:
        return True
    edges = np.linspace(a, b, 65)
    share = np.expm1(edges[:-1] - a) / np.expm1(b - a) if b - a < 700.0 else np.zeros(64)
    chord = np.minimum(at_a + (at_b - at_a) * share, _MOST_DELTA)
    above = special.log_ndtr(mu / 2.0 - edges[1:] / mu)
    taken = edges[1:] + special.log_ndtr(-mu / 2.0 - edges[1:] / mu) - above
    return bool(np.all(above + np.log(np.maximum(-np.expm1(taken), 1e-300)) >= np.log(chord)))
