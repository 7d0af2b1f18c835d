"""The audit of one real training: lower bounds on ε from how well the coins of its canaries can be guessed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from privet._checks import check_at_least, check_probability
from privet.accounting.accountant import get_accountant
from privet.accounting.phases import spent
from privet.audit.claim import Claim
from privet.audit.one_run import Guesses
from privet.audit.result import as_json, version_of_privet
from privet.errors import ConfigurationError

__all__ = ["TrainingAudit"]

_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""The shares of all canaries that are guessed, the auditor being surest of those. Each of them is a try."""


@dataclass(frozen=True)
class TrainingAudit:
    """What one run with canaries says about ε.

    Attributes:
        lower_bound: ε at `delta` is at least that, whatever the training does (Steinke et al.).
        lower_bound_gaussian: the same if the training is at least as private as some Gaussian (Mahloujifar et al.).
        claimed: the ε that was claimed, or None.
        refuted: whether the claim does not hold, with the given confidence; None without a claim.
        canaries, guesses, correct: of the best way of guessing.
        accuracy: how many of all coins are guessed by the sign of the score against the median.
        delta, confidence, tries, version: how it was found.
    """

    lower_bound: float
    lower_bound_gaussian: float
    claimed: float | None
    refuted: bool | None
    canaries: int
    guesses: int
    correct: int
    accuracy: float
    delta: float
    confidence: float
    tries: int
    version: str
    kind: str = "training"

    @classmethod
    def of(
        cls, scores: np.ndarray, members: np.ndarray, *, delta: float, claimed: Any = None, confidence: float = 0.95
    ) -> TrainingAudit:
        """Returns the audit of scores that are high for members.

        The auditor guesses "member" for the highest scores, and "left out" for the lowest. How many are guessed is
        chosen from a fixed list, and each entry of the list gets an equal share of what may go wrong.
        """
        check_probability("delta", delta)
        if delta == 0.0:
            raise ConfigurationError("delta must be above 0: a Gaussian mechanism has no finite ε at δ = 0.")
        order = np.argsort(scores, kind="stable")
        count = len(order)
        tries = [_guessed(order, members, max(2, round(count * share))) for share in _SHARES]
        options: dict[str, Any] = {"confidence": confidence, "tries": len(tries)}
        bounds = [guesses.epsilon(delta, **options) for guesses in tries]
        gaussian = [guesses.gaussian_epsilon(delta, **options) for guesses in tries]
        best = tries[int(np.argmax(gaussian))]
        epsilon, mu = _claimed(claimed, delta)
        refuted = None
        if epsilon is not None:
            refuted = max(bounds) > epsilon
            if mu is not None and math.isfinite(mu):
                refuted = refuted or any(guesses.refutes_gaussian(mu, **options) for guesses in tries)
        return cls(
            lower_bound=max(bounds),
            lower_bound_gaussian=max(gaussian),
            claimed=epsilon,
            refuted=refuted,
            canaries=count,
            guesses=best.guesses,
            correct=best.correct,
            accuracy=float(((scores > np.median(scores)) == members).mean()),
            delta=delta,
            confidence=confidence,
            tries=len(tries),
            version=version_of_privet(),
        )

    def to_json(self) -> str:
        """Returns the result as JSON; an infinite number becomes the string "inf"."""
        return as_json(asdict(self))

    def __str__(self) -> str:
        claim = "no ε was claimed" if self.claimed is None else f"claimed ε = {self.claimed:.4g}"
        verdict = "" if not self.refuted else ": the claim is refuted"
        return (
            f"{claim}; audited ε >= {self.lower_bound:.4g} whatever the training does, ε >= "
            f"{self.lower_bound_gaussian:.4g} if it is as private as a Gaussian, at δ = {self.delta:g} with "
            f"{self.confidence:.0%} confidence{verdict}\n{self.correct} of {self.guesses} guesses were right, "
            f"of {self.canaries} canaries; all coins guessed: {self.accuracy:.1%}"
        )


def _guessed(order: np.ndarray, members: np.ndarray, guesses: int) -> Guesses:
    """Returns how many are right of so many guesses, half of them on each end."""
    low, high = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return Guesses(len(order), guesses, int(members[high].sum() + (~members[low]).sum()))


def _claimed(told: Any, delta: float) -> tuple[float | None, float | None]:
    """Returns the claimed ε, and μ of a Gaussian that the claim lies under, where they are known."""
    if told is None:
        return None, None
    if isinstance(told, int | float) and not isinstance(told, bool):
        return check_at_least("claimed", told) if math.isfinite(told) else math.inf, None
    claim = Claim.of(told)
    mu = get_accountant("pld").mu(spent(claim.phases), relation=claim.relation)
    return claim.epsilon(delta), mu
