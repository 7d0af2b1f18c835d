"""How well scores tell members from others: true positive rates at low false positive rates, with intervals.

Averages hide leaks: an attack that is sure about one record in a hundred is near chance on average (Carlini et al.,
"Membership inference attacks from first principles", arXiv 2112.03570, section 3). So rates are given at low false
positive rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from privet._checks import check_probability
from privet.audit.intervals import upper_rate
from privet.errors import ConfigurationError

__all__ = ["Point", "Roc"]


@dataclass(frozen=True)
class Point:
    """A true positive rate at a false positive rate, and its interval."""

    false_positive_rate: float
    true_positive_rate: float
    low: float
    high: float
    confidence: float


class Roc:
    """The receiver operating characteristic of scores that are high for members.

    Args:
        members: (M,) scores of records that were trained on.
        others: (N,) scores of records that were not, from the same population.
    """

    def __init__(self, members: Any, others: Any) -> None:
        self.members, self.others = (np.asarray(values, dtype=float).ravel() for values in (members, others))
        if not (self.members.size and self.others.size):
            raise ConfigurationError("expected scores of members and of others, got none of one of them.")
        if not (np.isfinite(self.members).all() and np.isfinite(self.others).all()):
            raise ConfigurationError("expected finite scores. A record without a score can be left out of both sides.")

    @property
    def auc(self) -> float:
        """The chance that a member's score is above another's, ties counted half: 0.5 is no leak at all."""
        ordered = np.sort(self.others)
        below, above = np.searchsorted(ordered, self.members, "left"), np.searchsorted(ordered, self.members, "right")
        return float((below + above).mean() / 2.0 / ordered.size)

    def at(self, false_positive_rate: float, *, confidence: float = 0.95) -> Point:
        """Returns the true positive rate at a false positive rate, with its Clopper-Pearson interval.

        The threshold is the smallest at which no larger share of the others is above it.
        """
        rate = check_probability("false_positive_rate", false_positive_rate)
        allowed = int(rate * self.others.size)
        ordered = np.sort(self.others)[::-1]
        threshold = ordered[allowed] if allowed < ordered.size else -np.inf
        hits, trials = int((self.members > threshold).sum()), self.members.size
        share = (1.0 - confidence) / 2.0
        return Point(
            rate, hits / trials, 1.0 - upper_rate(trials - hits, trials, share), upper_rate(hits, trials, share),
            confidence,
        )  # fmt: skip

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns false and true positive rates at every threshold, from (0, 0) to (1, 1)."""
        thresholds = np.unique(np.concatenate([self.members, self.others]))[::-1]
        false = 1.0 - np.searchsorted(np.sort(self.others), thresholds, "left") / self.others.size
        true = 1.0 - np.searchsorted(np.sort(self.members), thresholds, "left") / self.members.size
        return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])

    def __repr__(self) -> str:
        said = ", ".join(f"{self.at(rate).true_positive_rate:.2%} at {rate:g}" for rate in (1e-3, 1e-2, 0.1))
        return f"<Roc: AUC {self.auc:.3f}; true positive rate {said}>"
