"""Results of audits, as they are handed to a report, and what they say about its promise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from privet._checks import check_at_least, check_count, check_probability
from privet.errors import ConfigurationError

__all__ = ["Audit", "audits_of"]

_NEEDED = ("kind", "lower_bound", "delta", "confidence", "canaries", "version")


@dataclass(frozen=True)
class Audit:
    """What one audit found.

    Attributes:
        kind: how it was done.
        lower_bound: ε is at least this much, with the stated confidence. Infinity is what no noise has.
        claimed: the ε that was audited, or None where the audit knew of none.
        delta: the δ of both.
        confidence: the probability with which a lower bound above the truth does not happen, in (0, 1).
        canaries: how many records were inserted for it.
        seconds: how long it took, or None where that is not said.
        version: of the program that did it.
        findings: what else contradicts what is on record, in words.
    """

    kind: str
    lower_bound: float
    claimed: float | None
    delta: float
    confidence: float
    canaries: int
    seconds: float | None
    version: str
    findings: tuple[str, ...] = ()

    @staticmethod
    def of(values: object) -> Audit:
        """Returns the audit that a mapping of JSON describes, such as `to_json()` of an audit of `privet.audit`.

        claimed, seconds and findings may be missing. Other keys are left aside.

        Raises:
            ConfigurationError: if a key is missing, or a value is out of its range.
        """
        given = values if isinstance(values, Mapping) else {}
        missing = [key for key in _NEEDED if key not in given]
        if missing:
            raise ConfigurationError(f"An audit has at least the keys {', '.join(_NEEDED)}; missing are {missing}.")
        kind, version, findings = given["kind"], given["version"], given.get("findings", ())
        if not isinstance(kind, str) or not isinstance(version, str):
            raise ConfigurationError(f"kind and version of an audit must be texts, got {kind!r} and {version!r}.")
        if not isinstance(findings, list | tuple) or not all(isinstance(each, str) for each in findings):
            raise ConfigurationError(f"findings of an audit must be a list of texts, got {findings!r}.")
        confidence = check_probability("confidence", given["confidence"])
        if not 0.0 < confidence < 1.0:
            raise ConfigurationError(f"confidence must lie between 0 and 1, got {confidence!r}.")
        claimed, seconds = given.get("claimed"), given.get("seconds")
        return Audit(
            kind=kind,
            lower_bound=_epsilon("lower_bound", given["lower_bound"]),
            claimed=None if claimed is None else _epsilon("claimed", claimed),
            delta=check_probability("delta", given["delta"]),
            confidence=confidence,
            canaries=check_count("canaries", given["canaries"]),
            seconds=None if seconds is None else check_at_least("seconds", seconds),
            version=version,
            findings=tuple(findings),
        )

    def to_dict(self) -> dict[str, object]:
        """Returns the audit as plain values."""
        return asdict(self)


def _epsilon(name: str, value: object) -> float:
    """Returns an ε, which may be infinite, as a number or as JSON's text for it."""
    return math.inf if value in ("inf", math.inf) else check_at_least(name, value)


def audits_of(values: Iterable[object]) -> tuple[Audit, ...]:
    """Returns the audits that mappings describe; an error names the one it is about."""
    found = []
    for index, each in enumerate(values):
        try:
            found.append(Audit.of(each))
        except ConfigurationError as error:
            raise ConfigurationError(f"Audit {index}: {error}") from error
    return tuple(found)
