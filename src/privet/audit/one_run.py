"""Lower bounds on ε from one run in which many canaries were included by fair coins.

An auditor guesses the coins of some canaries, and abstains on the others. How many guesses can be right is bounded for
every private training, however the canaries interact. Two bounds: one for every (ε, δ)-private mechanism (Steinke, Nasr
and Jagielski, arXiv 2305.08846), and a tighter one for a mechanism whose trade-off curve is known, here a Gaussian's
(Mahloujifar, Melis and Chaudhuri, arXiv 2410.22235).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtrc, ndtr, ndtri

from privet._checks import check_at_least, check_count, check_positive, check_probability
from privet.accounting.gaussian import gaussian_mu
from privet.errors import ConfigurationError

__all__ = ["Guesses"]

_MOST_EPSILON = 100.0  # further than any number of canaries that fits into memory can tell
_STEPS = 60  # of a bisection


@dataclass(frozen=True)
class Guesses:
    """How well the coins of one run were guessed.

    Args:
        canaries: how many were tossed for, m.
        guesses: for how many of them a guess was made, r; the auditor abstained on the others.
        correct: how many guesses were right, v.

    Example:
        >>> round(Guesses(canaries=1000, guesses=100, correct=100).epsilon(delta=1e-5, confidence=0.95), 3)
        3.465
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        check_count("canaries", self.canaries, 1)
        check_count("guesses", self.guesses)
        check_count("correct", self.correct)
        if not self.correct <= self.guesses <= self.canaries:
            raise ConfigurationError(
                f"expected correct <= guesses <= canaries, got {self.correct}, {self.guesses} and {self.canaries}."
            )

    # -- every (ε, δ)-private mechanism ------------------------------------------------------------------------------

    def p_value(self, epsilon: float, delta: float) -> float:
        """Returns a bound on how probable so many right guesses are if the training is (ε, δ)-private.

        Source: arXiv 2305.08846, theorem 5.2, in the form of its appendix D for r guesses in all.
        """
        epsilon, delta = check_at_least("epsilon", epsilon), check_probability("delta", delta)
        r, v = self.guesses, self.correct
        if v == 0 or r == 0:
            return 1.0
        chance = 1.0 / (1.0 + math.exp(-epsilon))
        at_least = _tail(np.arange(v, -1, -1), r, chance)  # Pr[Bin(r, chance) >= v - i] for i = 0 .. v
        beta = float(at_least[0])
        steps = np.arange(1, v + 1)
        worst = float(np.max((at_least[1:] - beta) / steps))
        return min(1.0, beta + 2.0 * self.canaries * delta * worst)

    def epsilon(self, delta: float, *, confidence: float = 0.95, tries: int = 1) -> float:
        """Returns ε such that a training with a smaller one at δ is refuted, with the given confidence.

        Args:
            delta: in [0, 1).
            confidence: in (0, 1).
            tries: how many ways of guessing were looked at before this one was chosen. Each gets an equal share of
                what may go wrong (Bonferroni).
        """
        allowed = _significance(confidence, tries)
        return _largest(lambda epsilon: self.p_value(epsilon, delta) < allowed)

    # -- a Gaussian's trade-off curve --------------------------------------------------------------------------------

    def refutes_gaussian(self, mu: float, *, confidence: float = 0.95, tries: int = 1) -> bool:
        """Returns whether so many right guesses refute that the training is at least as private as a Gaussian's μ.

        Source: arXiv 2410.22235, theorem 3.2 and algorithm 2, with f the trade-off curve of N(0, 1) and N(μ, 1).
        """
        mu = check_at_least("mu", mu)
        m, g, v = self.canaries, self.guesses, self.correct
        if g == 0 or v == 0:
            return False
        significance = _significance(confidence, tries)
        right, wrong = significance * v / m, significance * (g - v) / m
        for i in range(v - 1, -1, -1):
            raised = max(wrong, float(ndtr(ndtri(right) - mu)))
            if raised == wrong:
                break
            right = min(1.0, right + i / (g - i) * (raised - wrong))
            wrong = raised
        return right + wrong > g / m

    def gaussian_epsilon(self, delta: float, *, confidence: float = 0.95, tries: int = 1) -> float:
        """Returns ε at δ such that every Gaussian with a smaller one is refuted, with the given confidence.

        It bounds ε of trainings whose trade-off curve lies above that of the Gaussian with the same ε at δ. No
        Gaussian has a finite ε at δ = 0, so δ must be above 0.
        """
        delta = check_positive("delta", check_probability("delta", delta))
        return _largest(
            lambda epsilon: self.refutes_gaussian(gaussian_mu(epsilon, delta), confidence=confidence, tries=tries)
        )


def _tail(successes: np.ndarray, trials: int, chance: float) -> np.ndarray:
    """Returns Pr[Bin(trials, chance) >= k] for each k."""
    return np.where(successes <= 0, 1.0, bdtrc(np.maximum(successes - 1, 0), trials, chance))


def _significance(confidence: float, tries: int) -> float:
    check_probability("confidence", confidence)
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence must be in (0, 1), got {confidence!r}.")
    return (1.0 - confidence) / check_count("tries", tries, 1)


def _largest(refuted: Callable[[float], bool]) -> float:
    """Returns the largest ε found to be refuted; 0 if none is. Refutation is monotone: less ε is easier to refute."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2.0 * high
        if high > _MOST_EPSILON:
            return low
    for _ in range(_STEPS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
