"""The audit of a mechanism: does the training, as it is written, add the noise and draw the batches that it bills?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from privet._checks import check_count, check_probability
from privet.audit.canaries import CanaryBook, WithCanaries, canaries_like
from privet.audit.claim import Claim
from privet.audit.evidence import Evidence
from privet.audit.result import as_json, version_of_privet
from privet.audit.watch import watched
from privet.errors import ConfigurationError

__all__ = ["MechanismAudit", "assert_private", "audit_mechanism"]

Training = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class MechanismAudit:
    """What an audit found.

    Attributes:
        claimed: the ε that the training claims at `delta`.
        lower_bound: what ε is at least, with the given confidence. Infinity is a valid answer: it is that of no noise.
        by_noise: the lower bound from the noise that was measured, taken to be Gaussian.
        by_errors: the lower bound from an adversary's errors alone; it knows nothing of the noise's law.
        noise_ratio: the real noise over the claimed one, by canaries. 1 is right; less is too little noise.
        row_ratio: the same by rows that go through the model, each along its own gradient: less than 1 where a row
            moves the sum by more than the clip norm; more where dropout or the like changes the row's gradient.
        findings: what contradicts the bill, in words.
        delta, confidence, canaries, steps, seconds, version: how it was found.
    """

    claimed: float
    lower_bound: float
    by_noise: float
    by_errors: float
    noise_ratio: float
    row_ratio: float | None
    findings: tuple[str, ...]
    delta: float
    confidence: float
    canaries: int
    steps: int
    seconds: float
    version: str
    kind: str = "mechanism"

    @property
    def passed(self) -> bool:
        """Returns whether nothing contradicts the claim."""
        return self.lower_bound <= self.claimed and not self.findings

    def to_json(self) -> str:
        """Returns the result as JSON; an infinite number becomes the string "inf"."""
        return as_json(asdict(self))

    def __str__(self) -> str:
        verdict = "nothing contradicts the claim" if self.passed else "the claim is refuted"
        measured = f"{self.noise_ratio:.3g} times the claimed one"
        lines = [
            f"claimed ε = {self.claimed:.4g} at δ = {self.delta:g}, audited ε >= {self.lower_bound:.4g}: {verdict}",
            f"confidence {self.confidence:.4%}, {self.canaries} canaries, {self.steps} steps",
            f"noise measured: {measured}",
            *([] if self.row_ratio is None else [f"by rows of the model: {self.row_ratio:.3g} times"]),
            *(f"found: {finding}" for finding in self.findings),
        ]
        return "\n".join(lines)


def audit_mechanism(
    train: Training,
    *,
    model: nn.Module,
    dataset: Any,
    delta: float = 1e-5,
    canaries: int = 1000,
    confidence: float = 0.999,
    rows: bool = True,
    seed: int | None = None,
) -> MechanismAudit:
    """Runs a training with gradient canaries in it, and returns what its noise and its batches really were.

    Args:
        train: `train(model, dataset)` trains privately on what it is given, and returns what holds the bill: the
            `PrivacyEngine`, the `PrivateStep`, a ledger, or the event that is claimed. It builds loader and optimizer
            itself, as always. A few steps are enough.
        model: a copy of it is trained; it gets one more parameter, `audit_canaries`.
        dataset: its records are trained on beside the canaries.
        delta: of the ε that are compared.
        canaries: how many are tossed for. Half of them become records, on average.
        confidence: that a lower bound is not above the truth.
        rows: whether to train a second time, with one row of each batch in the spotlight, to see how far a record can
            move the model's own parameters.
        seed: of the secret coins; for tests. By default nobody knows them.

    Guarantees:
        A training that is right fails with a probability of at most 1 - confidence. It proves no upper bound: that is
        the accountant's business.

    Example:
        >>> import torch
        >>> from privet import PrivacyEngine
        >>> from privet.audit import audit_mechanism
        >>> def train(model, dataset):
        ...     engine = PrivacyEngine()
        ...     model, optimizer, loader = engine.make_private(
        ...         module=model,
        ...         optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        ...         data_loader=torch.utils.data.DataLoader(dataset, batch_size=len(dataset)),
        ...         noise_multiplier=1.0,
        ...         max_grad_norm=1.0,
        ...     )
        ...     for x, y in loader:
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        ...     return engine
        >>> data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randint(2, (20,)))
        >>> audit = audit_mechanism(train, model=torch.nn.Linear(4, 2), dataset=data, canaries=4000, rows=False)
        >>> audit.passed and audit.lower_bound > 0.7 * audit.claimed
        True
    """
    check_count("canaries", canaries, 8)
    check_probability("delta", delta)
    if not callable(train):
        raise ConfigurationError(f"train must be a function of model and data set, got {type(train).__name__}.")
    _require_enough(canaries, confidence)
    began = time.perf_counter()
    coins = torch.Generator()
    if seed is None:
        coins.seed()
    else:
        coins.manual_seed(seed)
    records = canaries_like(dataset, canaries, coins)
    members = torch.rand(canaries, generator=coins).lt(0.5).nonzero().flatten().tolist()

    def run(*, spotlight: bool) -> Evidence:
        trained = copy.deepcopy(model)
        entries = max(2 * canaries, canaries + 1000)
        with watched(trained, CanaryBook(records), entries=entries, spotlight=spotlight) as seen:
            told = train(trained, WithCanaries(dataset, [records[place] for place in members]))
        return Evidence.of(seen, members, Claim.of(told))

    evidence = run(spotlight=False)
    share = (1.0 - confidence) / (4.0 if rows else 3.0)
    ratio, most = evidence.louder(share)
    row_ratio, findings = None, evidence.findings(share)
    if rows:
        lit = run(spotlight=True)
        row_ratio, most_by_rows = lit.louder_for_rows(share)
        most = min(most, most_by_rows)
        if len(lit.signals) != len(evidence.signals):
            both = f"{len(evidence.signals)} in one run and {len(lit.signals)} in another on the same data"
            findings += (f"the number of steps was {both}: it tells who was drawn",)
    claim = evidence.claim
    by_noise = claim.least_epsilon(delta, louder=most) if most < float("inf") else 0.0
    by_errors = evidence.errors(1.0 - share).epsilon(delta)
    return MechanismAudit(
        claimed=claim.epsilon(delta),
        lower_bound=max(by_noise, by_errors),
        by_noise=by_noise,
        by_errors=by_errors,
        noise_ratio=ratio,
        row_ratio=row_ratio,
        findings=findings,
        delta=delta,
        confidence=confidence,
        canaries=canaries,
        steps=len(evidence.signals),
        seconds=time.perf_counter() - began,
        version=version_of_privet(),
    )


def assert_private(train: Training, *, model: nn.Module, dataset: Any, **options: Any) -> MechanismAudit:
    """Audits a training, and fails a test if its claim is refuted; see `audit_mechanism` for the arguments.

    Raises:
        AssertionError: with what was claimed and what was found.
    """
    audit = audit_mechanism(train, model=model, dataset=dataset, **options)
    if not audit.passed:
        raise AssertionError(str(audit))
    return audit


def _require_enough(canaries: int, confidence: float) -> None:
    """Raises if even a perfect test of so few canaries says nothing at this confidence."""
    check_probability("confidence", confidence)
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence must be in (0, 1), got {confidence!r}.")
    # With n members on one half and no error, the rate is at most 1 - share^(1/n): below 1/2 from log2(1/share) on.
    share = (1.0 - confidence) / 6.0
    least = 0
    while 0.5**least > share:
        least += 1
    if canaries < 8 * least:
        raise ConfigurationError(
            f"{canaries} canaries cannot say anything with confidence {confidence:g}. Expected at least {8 * least}."
        )
