"""The promise in words, for readers who know no formula. Each function returns one or two plain sentences."""

from __future__ import annotations

import math

from privet.accounting.decimals import rounded_text
from privet.report.facts import Facts
from privet.report.hazards import BY_USER, COLLECTED, REPRODUCIBLE, ROWS_TOO

__all__ = ["in_plain_words", "mark_in_words", "number", "relation_in_words", "unit_in_words", "warnings"]

_RELATIONS = {
    "add_or_remove_one": "two data sets are neighbors if one of them has one {unit} more",
    "replace_one": "two data sets are neighbors if one {unit} of them differs",
    "zero_out": (
        "two data sets are neighbors if one {unit} of them is replaced by one that contributes nothing; the number "
        "of records is public"
    ),
}
_UNITS = {
    "example": "one example: one row of a batch",
    "sequence": "one sequence, as it was cut for training",
    "user": "all records of one user",
    "group": "all records of one group",
}
_MARKS = {
    REPRODUCIBLE: "a run had a reproducible key: its noise can be drawn again by whoever knows the seed",
    "batches left out": (
        "batches of a pass were left out and billed all the same; if the choice depended on what was in them, ε does "
        "not cover it"
    ),
    "batches read ahead or left out": (
        "batches were drawn that no step was seen to take, and they were billed; if they were left out because of "
        "what was in them, ε does not cover it"
    ),
    BY_USER: "ε of these steps is for all records of one user, whatever their number",
    ROWS_TOO: "ε of those steps is for one row; it is for a user only if nobody has two rows",
    COLLECTED: "clip fractions and norms of gradients were shown to those who trained; ε does not cover them",
    "a parameter changed while p.grad was not private": (
        "a parameter changed by hand while a gradient without noise could be seen; the ledger counts it as a release "
        "without protection"
    ),
}


def number(value: float, *, up: bool = True, digits: int = 4) -> str:
    """Returns a bound for people, rounded to the side that promises less."""
    return "∞" if value == math.inf else rounded_text(value, up=up, digits=digits)


def relation_in_words(facts: Facts) -> str:
    """Returns what neighbors are."""
    return _RELATIONS[facts.relation].format(unit=facts.unit)


def unit_in_words(facts: Facts) -> str:
    """Returns whose data the promise is about."""
    return _UNITS[facts.unit]


def mark_in_words(mark: str) -> str:
    """Returns a mark with what it means, or the mark itself where it is not one of the library's own."""
    return f"{mark}: {_MARKS[mark]}" if mark in _MARKS else mark


def in_plain_words(facts: Facts) -> tuple[str, ...]:
    """Returns the promise in a paragraph, and what it means for an attack in another one."""
    if not facts.promised:
        return (
            (
                "No promise can be made. By what is on record, the accountant has no bound on what the releases tell "
                f"about one {facts.unit}: ε is infinite. The reasons are listed under the accountant's notes."
            ),
        )
    rate, power = min(facts.attacks, key=lambda each: abs(each[0] - 0.01))
    factor = number(min(math.exp(min(facts.epsilon.upper, 690.0)), 1e300))
    other = "been another one" if facts.relation == "replace_one" else "not been used"
    return (
        (
            f"The promise is about what anybody can learn of one {facts.unit}. Compare the training that ran with one "
            f"in which the data of that {facts.unit} had {other}. Whatever may come out of it, its probability in the "
            f"one is at most e^ε = {factor} times that in the other, plus δ = {facts.delta:g}. With a factor near 1, "
            f"what was released tells nearly nothing about that {facts.unit}; the larger it is, the less is promised."
        ),
        (
            "For example: somebody knows all other data and everything that was released, and guesses whether one "
            f"{facts.unit} was there. If they accept {_of_thousand(rate)} false alarms, they find at most "
            f"{_of_thousand(power)} of those who were there. A guess that looks at nothing finds {_of_thousand(rate)}."
        ),
    )


def warnings(facts: Facts) -> tuple[str, ...]:
    """Returns what a reader has to know before anything else."""
    found = []
    if REPRODUCIBLE in facts.marks:
        found.append(
            "A run in this ledger had a reproducible key. Unless its seed is secret, this report promises nothing."
        )
    for audit, epsilon in facts.audits:
        if audit.lower_bound > epsilon:
            found.append(
                f"An audit ({audit.kind}) contradicts this report: it found ε >= {number(audit.lower_bound, up=False)} "
                f"at δ = {audit.delta:g} with confidence {audit.confidence:g}, and the ledger says at most "
                f"{number(epsilon)}. The mechanism that ran is then not the one on record."
            )
        found += [f"An audit ({audit.kind}) contradicts this report: {each}" for each in audit.findings]
    return tuple(found)


def _of_thousand(share: float) -> str:
    """Returns a share as a count of 1000, rounded up."""
    count = math.ceil(share * 1000.0 - 1e-9)
    return f"{count} of 1000"
