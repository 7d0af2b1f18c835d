"""Hyperparameters chosen by private data: a secret number of trials, of which only the best is released."""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Generic, TypeVar

from privet.accounting import AbstractLedger, Event, LedgerLike, NoEvent
from privet.accounting.role import check_ledger
from privet.errors import ConfigurationError, ProtocolError
from privet.tuning.runs import Runs
from privet.tuning.trial_ledger import TrialLedger

__all__ = ["ScoreFrom", "Trial", "select"]

T = TypeVar("T")
_BROKEN = "a selection was broken off by an error, and that it was is not covered by epsilon"
_SEEDED = "reproducible key"


class ScoreFrom(enum.Enum):
    """What the score of a trial is computed from. There is no third choice: any other score has no bound."""

    RELEASED_AND_PUBLIC = "the released result and public data alone"
    BILLED = "private data too, with noise whose event is a part of the declared run"


@dataclass(frozen=True)
class Trial(Generic[T]):
    """What a trial returns: its result, and a number that says how good it is. The largest score wins."""

    score: float
    result: T


def select(
    trial: Callable[[AbstractLedger], Trial[T]],
    *,
    runs: Runs,
    run: Event,
    ledger: LedgerLike,
    score_from: ScoreFrom,
    seed: int | None = None,
) -> Trial[T] | None:
    """Runs `trial` a secret, random number of times and returns the best of them, or None if there was none.

    The whole selection is billed to `ledger` before the first trial begins. Papernot and Steinke, arXiv 2110.03620.

    What this promises holds if a trial draws its hyperparameters itself, by a law that is fixed and public, and keeps
    nothing between calls; and if nobody sees but what is returned: no logs, no checkpoints of other trials, and not how
    long it took, which tells about how many there were. Scores that are not a number count as the worst, and of equal
    ones a random one wins.

    Args:
        trial: trains once with the ledger that it is handed, such as by `PrivacyEngine(ledger=...)`, and returns a
            `Trial`.
        runs: the law of the number of trials, `PoissonRuns` or `NegativeBinomialRuns`.
        run: the event of one whole trial. A trial that begins more is stopped.
        ledger: what pays.
        score_from: what scores are computed from. There is no default: a score that looks at private data without
            noise, such as the accuracy on them, makes the whole selection unprotected.
        seed: makes the number of trials reproducible, and says so in the ledger; for tests.

    Raises:
        BudgetExceededError: if the selection would exceed the ledger's budget. Nothing is begun then.
        ProtocolError: if a trial begins nothing, so that it cannot have trained with its ledger.

    Example:
        >>> import random
        >>> from privet.accounting import GaussianEvent, Ledger
        >>> from privet.tuning import NegativeBinomialRuns, ScoreFrom, Trial, select
        >>> def trial(ledger):
        ...     ledger.begin(GaussianEvent(4.0))
        ...     rate = random.choice([0.1, 0.3, 1.0])
        ...     return Trial(score=-abs(rate - 0.3), result=rate)
        >>> ledger, runs = Ledger(), NegativeBinomialRuns(shape=1.0, success=0.1)
        >>> best = select(
        ...     trial, runs=runs, run=GaussianEvent(4.0), ledger=ledger, score_from=ScoreFrom.RELEASED_AND_PUBLIC
        ... )
        >>> ledger.steps, best.result in (0.1, 0.3, 1.0)
        (1, True)
    """
    if not isinstance(score_from, ScoreFrom):
        raise ConfigurationError(
            f"score_from must be a ScoreFrom, got {score_from!r}. A score may use the released result and public data, "
            "or private data with noise that is billed in `run`. A score of private data without noise has no bound."
        )
    paying, event = check_ledger(ledger), runs.event(run)
    source = random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311  a seed is for tests
    paying.begin(event)
    if seed is not None:
        paying.mark(_SEEDED)
    best: tuple[tuple[float, float], Trial[T]] | None = None
    try:
        for _ in range(runs.draw(source)):
            found = _once(trial, run, paying)
            rank = (-math.inf if math.isnan(found.score) else found.score, source.random())
            if best is None or rank > best[0]:
                best = (rank, found)
    except BaseException:
        paying.mark(_BROKEN)
        raise
    return None if best is None else best[1]


def _once(trial: Callable[[AbstractLedger], Trial[T]], run: Event, paying: LedgerLike) -> Trial[T]:
    """Returns what one trial returned, after checking its form."""
    own = TrialLedger(run, paying)
    found: object = trial(own)
    score: object = found.score if isinstance(found, Trial) else None
    if not isinstance(found, Trial) or isinstance(score, bool) or not isinstance(score, Real):
        raise ConfigurationError(f"A trial must return a Trial with a number as its score, got {type(found).__name__}.")
    if own.steps == 0 and not isinstance(run, NoEvent):
        raise ProtocolError(
            "A trial began nothing on the ledger that it was handed, so that nobody knows what it released. Give that "
            "ledger to the door that trains: PrivacyEngine(ledger=...) or PrivateStep(..., ledger=...)."
        )
    return found
