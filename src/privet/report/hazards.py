"""The hazards of differential privacy, and for each whether the library, the user, or nobody has taken care of it.

The list follows NIST SP 800-226 (2025) and the list of things to report of Ponomareva et al., "How to DP-fy ML",
arXiv 2303.00654, section 5.3, in words of our own. Statuses are facts: "library" where this library's design or the
ledger settles it, "user" where the user declared what was done, "open" where neither did.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from privet.report.declared import TOPICS
from privet.report.described import holds_selection
from privet.report.facts import Facts

__all__ = ["BY_USER", "COLLECTED", "REPRODUCIBLE", "ROWS_TOO", "Hazard", "Status", "hazards"]

REPRODUCIBLE = "reproducible key"
"""The mark of a run whose noise another person can draw again."""

COLLECTED = "statistics without noise were collected"
"""The mark of a run that showed clip fractions and norms of gradients."""

BY_USER = "users were drawn, and the gradient of each was clipped as a whole"
"""The mark of a run with steps of users who have several records."""

ROWS_TOO = "beside users who were drawn, rows were taken for one user each"
"""The mark of a run with both kinds of steps: the second rests on how the data set was built."""


class Status(enum.Enum):
    """Who took care of a hazard."""

    LIBRARY = "library"
    USER = "user"
    OPEN = "open"


@dataclass(frozen=True)
class Hazard:
    """One way to lose privacy or to misread a promise, who took care of it, and how."""

    name: str
    status: Status
    detail: str


def hazards(facts: Facts) -> tuple[Hazard, ...]:
    """Returns every hazard of the list with its status for this run."""
    return tuple(look(facts) for look in _LIST)


def _declared(name: str, topic: str, missing: str) -> Callable[[Facts], Hazard]:
    """Returns a look at a hazard that only the user can settle."""

    def look(facts: Facts) -> Hazard:
        text = facts.declarations.get(topic)
        if text is None:
            return Hazard(name, Status.OPEN, f"{missing} Nothing was declared ({topic}: {TOPICS[topic]}).")
        return Hazard(name, Status.USER, f"Declared: {text}")

    return look


def _settled(name: str, detail: str) -> Callable[[Facts], Hazard]:
    """Returns a look at a hazard that the library's design settles in every run."""
    return lambda facts: Hazard(name, Status.LIBRARY, detail)


def _delta(facts: Facts) -> Hazard:
    name = "A δ that is too large"
    if facts.dataset_size is None:
        return Hazard(name, Status.OPEN, "The number of records n was not given, so that δ was not compared with 1/n.")
    size = facts.dataset_size
    return Hazard(name, Status.LIBRARY, f"δ = {facts.delta:g} is below 1/n = {1.0 / size:.3g} for n = {size} records.")


def _unit(facts: Facts) -> Hazard:
    name = "One person with many records"
    said = facts.declarations.get("contribution")
    if said is not None:
        return Hazard(name, Status.USER, f"The unit is one {facts.unit}. Declared: {said}")
    if BY_USER in facts.marks and ROWS_TOO not in facts.marks:
        text = f"The unit is one {facts.unit}: users were drawn, and all that one of them added was clipped together."
        return Hazard(name, Status.LIBRARY, text)
    if facts.unit in ("user", "group"):
        text = f"The ledger says that one unit is one {facts.unit}. That sums are bounded for it is the user's claim."
        return Hazard(name, Status.USER, text)
    text = f"The promise is for one {facts.unit}. A person with k of them has less: up to k times ε, and more δ."
    return Hazard(name, Status.OPEN, text)


def _tuning(facts: Facts) -> Hazard:
    name = "Hyperparameters that were chosen by looking at the private data"
    if holds_selection(facts.phases):
        text = "A selection among several runs is in the ledger, and in ε. Other searches are not."
        said = facts.declarations.get("tuning")
        return Hazard(name, Status.LIBRARY, text if said is None else f"{text} Declared: {said}")
    return _declared(name, "tuning", "No selection is in the ledger: every other trial would cost privacy too.")(facts)


def _key(facts: Facts) -> Hazard:
    name = "Keys that can be known"
    if REPRODUCIBLE in facts.marks:
        text = "The ledger says that a run had a reproducible key. Whoever knows its seed can remove the noise."
        return Hazard(name, Status.OPEN, text)
    text = (
        "No run in the ledger is marked as one with a reproducible key. All other keys come from the operating system."
    )
    return Hazard(name, Status.LIBRARY, text)


_LIST: tuple[Callable[[Facts], Hazard], ...] = (
    _settled(
        "ε without its unit, its relation or its δ",
        "This report says all of them together, with the whole curve: ε of two reports compare only under one unit "
        "and relation.",
    ),
    _delta,
    _unit,
    _settled(
        "A confusion of neighboring relations",
        "The relation is typed: it is a part of the ledger, and no accountant converts one into another.",
    ),
    _settled(
        "A sensitivity that was computed wrongly",
        "Gradients are clipped for each example, and a clipped sum carries its own sensitivity, which the noise is "
        "scaled by.",
    ),
    _settled(
        "Batches that were not sampled as the accounting assumes",
        "Batches are billed by the sampler that drew them. A batch that did not come from it is billed without "
        "amplification.",
    ),
    _settled(
        "Steps that were not counted",
        "Each step is on record before its noise is drawn, and nothing is ever taken back. A step that broke off "
        "counts in full.",
    ),
    _tuning,
    _declared(
        "Preprocessing that was fitted to the private data",
        "preprocessing",
        "Statistics, vocabularies and filters from private data are no part of ε.",
    ),
    _declared(
        "A checkpoint or a time to stop that was chosen by private data",
        "early_stopping",
        "ε covers all checkpoints, but not a choice by a number that got no noise.",
    ),
    _declared(
        "Noise, rates or budgets that were chosen by looking at what was released",
        "adaptivity",
        "Composition holds for numbers that were fixed beforehand or follow public numbers.",
    ),
    lambda facts: _declared(
        "Statistics that were released without noise",
        "statistics",
        "Clip fractions and norms of gradients were collected, and are no part of ε; nor are loss and accuracy."
        if COLLECTED in facts.marks
        else "Training loss and accuracy on private data are no part of ε.",
    )(facts),
    _declared(
        "Data taken for public that are not",
        "public_data",
        "A pretrained model or a public data set may hold the same people.",
    ),
    _declared(
        "Other releases about the same data, and budgets that begin anew",
        "other_releases",
        "ε is of this ledger alone; what is outside of it adds to it.",
    ),
    _key,
    _declared(
        "A generator of noise that is not cryptographically secure",
        "randomness",
        "A ledger does not say which generator drew the noise. Those of privet are secure; your own may not be.",
    ),
    lambda facts: Hazard(
        "Floating-point numbers",
        Status.OPEN,
        "Noise and sums are floating-point numbers. ε is about real numbers; who sees exact bits may learn more.",
    ),
    _declared(
        "Side channels",
        "side_channels",
        "Time, memory and power of training are no part of ε.",
    ),
    _declared(
        "Access to raw data, keys and checkpoints",
        "access",
        "Whoever reaches the training machine needs no attack on the model.",
    ),
    _declared(
        "Trust in the one who holds the data",
        "trust",
        "Noise is added centrally: the promise protects against those who see releases, not against who trains.",
    ),
    _declared(
        "Errors and bias that noise and clipping make worse",
        "bias",
        "A promise of privacy says nothing about whom the model serves badly.",
    ),
)
