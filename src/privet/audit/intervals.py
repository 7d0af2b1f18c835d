"""Confidence bounds from counted errors of a membership test, and the privacy that they rule out.

A test looks at a run and says whether a canary was part of its data. Of n canaries that were not, `false_positives`
were said to be; of m that were, `false_negatives` were said not to be. Each canary is one independent experiment.
"""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtri

from privet._checks import check_count, check_probability
from privet.accounting.gaussian import gaussian_epsilon
from privet.errors import ConfigurationError

__all__ = ["Errors", "upper_rate"]


def upper_rate(errors: int, trials: int, significance: float) -> float:
    """Returns the Clopper-Pearson upper bound on an error rate: too low with a probability of at most `significance`.

    Args:
        errors: how often it happened, from 0 to `trials`.
        trials: independent experiments, at least 1.
        significance: in (0, 1).

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", Biometrika 26 (1934).
    """
    trials = check_count("trials", trials, 1)
    errors = check_count("errors", errors)
    if errors > trials:
        raise ConfigurationError(f"errors must be at most trials = {trials}, got {errors}.")
    if errors == trials:
        return 1.0
    return float(betaincinv(errors + 1.0, float(trials - errors), 1.0 - significance))


class Errors:
    """What a membership test got wrong, and what that says about (ε, δ) and μ.

    Args:
        false_positives: canaries that were left out and taken for members.
        absent: canaries that were left out, at least 1.
        false_negatives: canaries that were members and taken for left out.
        present: canaries that were members, at least 1.
        confidence: of every bound, in (0, 1). Each of the two rates gets half of what may go wrong.
    """

    def __init__(
        self, *, false_positives: int, absent: int, false_negatives: int, present: int, confidence: float = 0.95
    ) -> None:
        check_probability("confidence", confidence)
        share = (1.0 - confidence) / 2.0
        if not 0.0 < share < 0.5:
            raise ConfigurationError(f"confidence must be in (0, 1), got {confidence!r}.")
        self.confidence = confidence
        self.false_positive_rate = upper_rate(false_positives, absent, share)
        self.false_negative_rate = upper_rate(false_negatives, present, share)

    def epsilon(self, delta: float) -> float:
        """Returns ε such that no mechanism with a smaller one at δ allows so good a test, up to the confidence.

        Every (ε, δ)-private mechanism has FPR + e^ε FNR >= 1 - δ, and the same with the two exchanged: Kairouz, Oh and
        Viswanath, arXiv 1311.0776, theorem 2.1.
        """
        delta = check_probability("delta", delta)
        rates = self.false_positive_rate, self.false_negative_rate
        return max((_log_ratio(1.0 - delta - a, b) for a, b in (rates, rates[::-1])), default=0.0)

    def mu(self) -> float:
        """Returns μ such that no Gaussian with a smaller shift allows so good a test, up to the confidence.

        Nasr et al., arXiv 2302.07956, section 4.
        """
        return max(0.0, -float(ndtri(self.false_positive_rate)) - float(ndtri(self.false_negative_rate)))

    def gaussian_epsilon(self, delta: float) -> float:
        """Returns ε at δ of the Gaussian with shift `mu()`: the bound for a mechanism that is known to be Gaussian."""
        return gaussian_epsilon(self.mu(), check_probability("delta", delta))


def _log_ratio(numerator: float, denominator: float) -> float:
    if numerator <= denominator:
        return 0.0
    return math.inf if denominator == 0.0 else math.log(numerator / denominator)
