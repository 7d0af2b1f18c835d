"""The last thing that happens to every ε and δ: facts that cannot be wrong are held against it.

Every accountant's answer to every question leaves through `certified_epsilon` or `certified_delta`. Both compare it
with bounds that are found in another way than the answer: from below, and from above. An answer above a valid upper
bound is replaced by it: the bound without amplification, or another method's. An answer below a lower bound on the same
composed pairs contradicts it: the answer is then given up for the least one that does not, and a note says so. That is
never expected to happen, and is a bug of this library where it does; but nobody is told a smaller ε meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from privet.accounting.gaussian import gaussian_delta, gaussian_epsilon
from privet.accounting.terms import Reduced

__all__ = ["Claim", "certified_delta", "certified_epsilon"]

_CONTRADICTED = (
    "the {method} answer {answer:g} was below {fact:g}, which is needed at least: {used} is reported instead. "
    "Please report this event, it is a bug"
)


@dataclass(frozen=True)
class Claim:
    """A number that is claimed as an upper bound, and the method that it comes from."""

    value: float
    method: str


def certified_epsilon(
    claims: list[Claim], *, reduced: Reduced, delta: float, least: Callable[[], float]
) -> tuple[Claim, float, tuple[str, ...]]:
    """Returns the least upper bound that stands, what ε is at least, and notes on what was contradicted.

    Args:
        claims: Upper bounds on ε at `delta`, each by its own method.
        reduced: What was composed; without its sampling it is one Gaussian, which bounds ε from above.
        delta: The δ asked about.
        least: Returns a lower bound on the ε of the composed pairs that owes nothing to the claims.
    """
    fact = least()
    if reduced.squared_mu > 0.0:
        # What was not sampled is a part of the whole, and its ε is known exactly.
        fact = max(fact, gaussian_epsilon(math.sqrt(reduced.squared_mu), delta) * (1.0 - 1e-9))
    claim, notes = _checked(claims, fact, worst=math.inf, slack=1e-12)
    plain = Claim(gaussian_epsilon(math.sqrt(reduced.unamplified), delta), "unamplified")
    claim = min(claim, plain, key=lambda each: each.value)
    return claim, min(fact, claim.value), notes


def certified_delta(
    claims: list[Claim], *, reduced: Reduced, epsilon: float, least: Callable[[], float]
) -> tuple[Claim, float, tuple[str, ...]]:
    """Returns the same for δ at `epsilon`; where everything is contradicted δ is 1."""
    fact = least()
    if reduced.squared_mu > 0.0:
        fact = max(fact, gaussian_delta(math.sqrt(reduced.squared_mu), epsilon) * (1.0 - 1e-9))
    claim, notes = _checked(claims, fact, worst=1.0, slack=0.0)
    plain = Claim(gaussian_delta(math.sqrt(reduced.unamplified), epsilon), "unamplified")
    claim = min(claim, plain, key=lambda each: each.value)
    return claim, min(fact, claim.value), notes


def _checked(claims: list[Claim], fact: float, *, worst: float, slack: float) -> tuple[Claim, tuple[str, ...]]:
    valid = sorted((each for each in claims if not math.isnan(each.value)), key=lambda each: each.value)
    notes: list[str] = []
    for place, claim in enumerate(valid):
        if claim.value >= fact * (1.0 - 1e-9) - slack:
            return claim, tuple(notes)
        following = valid[place + 1].method if place + 1 < len(valid) else str(worst)
        notes.append(_CONTRADICTED.format(method=claim.method, answer=claim.value, fact=fact, used=following))
    return Claim(worst, "none"), tuple(notes)
