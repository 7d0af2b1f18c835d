"""What a watched training shows: the noise that it really had, who took part, and what an adversary can tell.

Axes: T steps, P canaries that were members, A entries that belong to no member.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, bdtrc, chdtr, chdtrc, ndtri

from privet.audit.claim import Claim, noise_of, rate_of
from privet.audit.intervals import Errors
from privet.audit.watch import Seen
from privet.errors import ConfigurationError

__all__ = ["Evidence"]


@dataclass(frozen=True)
class Evidence:
    """Numbers of one run, in the terms of its canaries.

    Attributes:
        signals: (T, P) gradient of each member's own entry, its sign taken out.
        part: (T, P) whether the member took part in the step.
        noise: (T, A) gradient of entries that belong to no member.
        lengths: of each step, how far it went along rows of the model, and how many units of the clip norm they are.
        claim: what was billed.
    """

    signals: np.ndarray
    part: np.ndarray
    noise: np.ndarray
    lengths: tuple[tuple[float, float] | None, ...]
    claim: Claim

    @classmethod
    def of(cls, seen: Seen, members: Sequence[int], claim: Claim) -> Evidence:
        """Returns the evidence of what was seen.

        Raises:
            ConfigurationError: if no canary met the model, or the sign of a canary's gradient changed.
        """
        if not seen.gradients:
            raise ConfigurationError(
                "no optimizer step was seen. Expected a training that steps an optimizer over all of the model's "
                "parameters: audit_canaries is one of them."
            )
        if not seen.rows:
            raise ConfigurationError(
                "no canary met the model. Expected the records of the data set to reach the model as they are: "
                "canaries are told by the bits of their first tensor. Leave out changes between loader and model, "
                "such as normalization or a move to another type, or make them inside the model."
            )
        signs: dict[int, float] = {}
        for step in seen.signs:
            for place, sign in step.items():
                if sign and signs.setdefault(place, sign) != sign:
                    raise ConfigurationError(
                        "the loss of a canary's constant output had slopes of both signs. Expected a loss that is a "
                        "function of the outputs and the record alone."
                    )
        gradients = np.stack([g.numpy() for g in seen.gradients])
        chosen = list(members)
        others = np.setdiff1d(np.arange(gradients.shape[1]), chosen)
        direction = np.array([signs.get(place, 1.0) for place in chosen])
        part = np.array([[place in step for place in chosen] for step in seen.signs], dtype=bool)
        return cls(gradients[:, chosen] * direction, part, gradients[:, others], tuple(seen.lengths), claim)

    # -- the noise ---------------------------------------------------------------------------------------------------

    def louder(self, significance: float) -> tuple[float, float]:
        """Returns how many times the claimed noise the real noise is: an estimate, and an upper bound.

        One unit of the clip norm against one standard deviation, over all steps and members that took part. The noise
        is taken to be Gaussian. The bound is too low with a probability of at most `significance`.
        """
        sums = np.where(self.part, self.signals, 0.0).sum(axis=1)
        return self._compared(sums, self.part.sum(axis=1).astype(float), significance)

    def louder_for_rows(self, significance: float) -> tuple[float, float]:
        """Returns the same for rows that went through the model, each along its own gradient (`Spotlight`)."""
        known = [(0.0, 0.0) if length is None else length for length in self.lengths]
        return self._compared(np.array([a * b for a, b in known]), np.array([b for _, b in known]), significance)

    def _compared(self, sums: np.ndarray, counts: np.ndarray, significance: float) -> tuple[float, float]:
        """Returns the ratio for `sums` of `counts` units in each step: a unit is 1 / σ deviations, give or take 1."""
        multipliers = self._multipliers()
        spread = self.noise.std(axis=1)
        if not counts.sum():
            return math.inf, math.inf
        if (spread[counts > 0] == 0.0).any():
            return 0.0, 0.0
        each = sums / np.where(counts > 0, spread, 1.0)
        weight = float((counts / multipliers**2).sum())
        inverse = float((each / multipliers).sum()) / weight  # least squares
        z = -float(ndtri(significance / 2.0))
        least = (inverse - z / math.sqrt(weight)) / (1.0 + z / math.sqrt(2.0 * self.noise.size))
        return 1.0 / inverse if inverse > 0.0 else math.inf, 1.0 / least if least > 0.0 else math.inf

    def _multipliers(self) -> np.ndarray:
        """Returns the claimed noise multiplier of each step."""
        each = [noise_of(event) for event in self.claim.each()]
        known = [value for value in each if value is not None]
        if len(known) == len(each) == len(self.signals):
            return np.maximum(known, 1e-12)
        if not known or max(known) != min(known):
            raise ConfigurationError(
                f"the bill holds {len(each)} entries with noise multipliers {sorted(set(known))[:5]} for "
                f"{len(self.signals)} steps. Expected one entry for each step, or one noise multiplier for all."
            )
        return np.full(len(self.signals), max(known[0], 1e-12))

    # -- what an adversary can tell ----------------------------------------------------------------------------------

    def errors(self, confidence: float) -> Errors:
        """Returns the errors of the best threshold test, chosen on one half of the canaries and counted on the other.

        The score of an entry is its log likelihood ratio under the law that was seen: a unit in some of the steps.
        """
        rate = min(max(float(self.part.mean()), 1e-12), 1.0)
        counts = self.part.sum(axis=1)
        height = float(np.where(self.part, self.signals, 0.0).sum() / max(counts.sum(), 1))
        spread = np.maximum(self.noise.std(axis=1, keepdims=True), 1e-6 * max(abs(height), 1e-150))
        present, absent = (_scores(values, height, spread, rate) for values in (self.signals, self.noise))
        threshold = _best_threshold(present[::2], absent[::2], confidence)
        present, absent = present[1::2], absent[1::2]
        return Errors(
            false_positives=int((absent >= threshold).sum()),
            absent=len(absent),
            false_negatives=int((present < threshold).sum()),
            present=len(present),
            confidence=confidence,
        )

    # -- what cannot be so if the bill is right ----------------------------------------------------------------------

    def findings(self, significance: float) -> tuple[str, ...]:
        """Returns what contradicts the bill, each with a probability of at most an equal share of `significance`."""
        questions = (self._on_steps, self._on_participation, self._on_reuse, self._on_copies)
        share = significance / len(questions)
        return tuple(found for ask in questions for found in ask(share))

    def _on_steps(self, share: float) -> list[str]:
        billed, seen = self.claim.steps, len(self.signals)
        if any(rate_of(event) is None for event in self.claim.each()) or seen == billed:
            return []
        why = "" if seen > billed else ": a step that is not taken tells who was drawn, if it was for want of examples"
        return [f"{seen} steps were taken, and {billed} were billed{why}"]

    def _on_participation(self, share: float) -> list[str]:
        rates = [rate_of(event) for event in self.claim.each()]
        counts = self.part.sum(axis=0)  # of each member
        if any(rate is None for rate in rates):
            if counts.size and counts.max() > self.claim.steps:
                return [f"an example took part {counts.max()} times, and {self.claim.steps} were billed"]
            return []
        known = np.array([rate for rate in rates if rate is not None])
        if known.max() != known.min() or known[0] >= 1.0 or len(known) != len(self.signals):
            return []
        rate, trials, total = float(known[0]), self.part.size, int(counts.sum())
        found = []
        law = f"the bill claims that each example joins a batch with probability {rate:g}, independently"
        if min(bdtr(total, trials, rate), bdtrc(total - 1, trials, rate) if total else 1.0) < share / 8.0:
            found.append(f"{law}; {total} of {trials} did, which is {total / trials:g}")
        for sums, size, what in ((counts, len(self.signals), "example"), (self.part.sum(axis=1), len(counts), "batch")):
            # The dispersion of counts is about χ² where the law holds: less where sizes are forced to be alike. Its
            # skewness makes the tails heavier than χ² for small rates, so the share is halved twice more.
            variance = size * rate * (1.0 - rate)
            square = float(((sums - size * rate) ** 2).sum() / variance)
            below, above = chdtr(len(sums), square), chdtrc(len(sums), square * variance / (variance + 1.0))
            if min(below, above) < share / 8.0:
                kind = "less" if below < above else "more"
                found.append(f"{law}; the number of members for each {what} varies {kind} than that law allows")
        return found

    def _on_reuse(self, share: float) -> list[str]:
        """Noise of two steps, or of two halves of the entries, that is alike was drawn once and used twice."""
        steps, entries = self.noise.shape
        spread = self.noise.std(axis=1, keepdims=True)
        if entries < 8 or (spread == 0.0).any():
            return []
        values = (self.noise - self.noise.mean(axis=1, keepdims=True)) / spread
        pairs = steps * (steps - 1) // 2
        most = 0.0
        for index in range(steps - 1):
            most = max(most, float(np.abs(values[index + 1 :] @ values[index]).max()) / entries)
        if pairs and most * math.sqrt(entries) > -ndtri(share / (2.0 * pairs)) + 1.0:
            return [f"the noise of two steps has a correlation of {most:.2f}: noise was used again"]
        return []

    def _on_copies(self, share: float) -> list[str]:
        """Entries of one step that are equal to the last bit got one number twice. Float32 does not repeat so often."""
        for values in self.noise:
            _, counts = np.unique(values[values != 0.0], return_counts=True)
            repeated = int((counts - 1).sum()) if counts.size else 0
            # Two of n float32 normals are equal with a probability of about 1e-7 a pair.
            expected = len(values) ** 2 * 1e-7
            if repeated > 10.0 + 10.0 * expected:
                return [f"{repeated} of {len(values)} noise values of one step are copies of others"]
        return []


def _scores(values: np.ndarray, height: float, spread: np.ndarray, rate: float) -> np.ndarray:  # (T, K) -> (K,)
    ratio = (values * height - height**2 / 2.0) / spread**2
    each = ratio if rate >= 1.0 else np.logaddexp(math.log1p(-rate), math.log(rate) + ratio)
    return np.asarray(each.sum(axis=0))


def _best_threshold(present: np.ndarray, absent: np.ndarray, confidence: float) -> float:
    """Returns the threshold with the best bound on these scores."""
    candidates = np.unique(np.quantile(np.concatenate([present, absent]), np.linspace(0.0, 1.0, 201)))
    best, found = -1.0, float(candidates[0])
    for threshold in candidates:
        errors = Errors(
            false_positives=int((absent >= threshold).sum()),
            absent=len(absent),
            false_negatives=int((present < threshold).sum()),
            present=len(present),
            confidence=confidence,
        )
        value = errors.epsilon(1e-9) + 1e-3 * errors.mu()
        if value > best:
            best, found = value, float(threshold)
    return found
