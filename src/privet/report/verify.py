"""Whether a report is of a ledger, and whether its numbers are those of the accountant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from privet.accounting import LedgerLike, get_accountant, known_accountants
from privet.report.data import data_of
from privet.report.digest import ledger_digest
from privet.report.facts import gathered
from privet.report.schema import check_report

__all__ = ["Verification", "verify_report"]

_TOLERANCE = 1e-3  # relative; what the numbers of one version on two machines, or of two versions, may differ by
_COMPARED = ("ledger", "guarantee", "curve", "mu", "attacks", "phases", "hazards", "audits")


@dataclass(frozen=True)
class Verification:
    """What came of a check: whether the report is of the ledger, and all that differs."""

    same_ledger: bool
    differences: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the report is of this ledger and says what the accountant says."""
        return self.same_ledger and not self.differences


def verify_report(report: Mapping[str, Any], ledger: LedgerLike) -> Verification:
    """Returns whether a report, in its JSON form, is of a ledger and says what the accountant says about it.

    The digests are compared first. Then the report is made again, from the ledger and from what only its author could
    declare, and every number and every hazard is compared. What was declared cannot be checked.

    Raises:
        ConfigurationError: if `report` does not have the form of a report.
    """
    given = check_report(report)
    digest = ledger_digest(ledger)
    if digest != given["ledger"]["digest"]:
        steps = (given["ledger"]["steps"], ledger.steps)
        return Verification(
            same_ledger=False,
            differences=(
                (
                    f"the digest of the ledger is {digest}, and the report was made of one with the digest "
                    f"{given['ledger']['digest']}"
                ),
                f"the report counts {steps[0]} steps, and the ledger {steps[1]}",
            ),
        )
    name = given["guarantee"]["accountant"]
    if name not in known_accountants():
        missing = (
            f"the report is by the accountant {name!r}, which is not registered here; its numbers were not checked"
        )
        return Verification(same_ledger=True, differences=(missing,))
    found = data_of(
        gathered(
            ledger,
            accountant=get_accountant(name),
            delta=given["guarantee"]["delta"],
            dataset_size=given["dataset_size"],
            declarations=given["declarations"],
            audits=[{key: value for key, value in each.items() if key != "epsilon"} for each in given["audits"]],
            note=given["note"],
            created=given["created"],
        )
    )
    differences = tuple(each for key in _COMPARED for each in _differences(given[key], found[key], key))
    return Verification(same_ledger=True, differences=differences)


def _differences(given: object, found: object, place: str) -> Iterator[str]:
    """Yields what differs between two plain values."""
    if isinstance(given, Mapping) and isinstance(found, Mapping) and set(given) == set(found):
        for key in given:
            if key != "epsilon_lower_bound":  # lower bounds may be looser on another machine
                yield from _differences(given[key], found[key], f"{place}.{key}")
    elif isinstance(given, list) and isinstance(found, list) and len(given) == len(found):
        for index, (one, other) in enumerate(zip(given, found, strict=True)):
            yield from _differences(one, other, f"{place}[{index}]")
    elif isinstance(given, int | float) and isinstance(found, int | float):
        if not math.isclose(given, found, rel_tol=_TOLERANCE):
            yield f"{place} is {given!r} in the report, and {found!r} by the ledger"
    elif given != found:
        yield f"{place} is {given!r} in the report, and {found!r} by the ledger"
