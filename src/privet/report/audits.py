"""Results of audits, as they are handed to a report, and what they say about its promise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from privet._checks import check_at_least, check_count, check_probability
from privet.errors import ConfigurationError

__all__ = ["Audit", "audits_of"]

_KEYS = ("kind", "lower_bound", "claimed", "delta", "confidence", "canaries", "seconds", "version")


@dataclass(frozen=True)
class Audit:
    """What one audit found.

    Attributes:
        kind: how it was done.
        lower_bound: ε is at least this much, with the stated confidence.
        claimed: the ε that was audited, infinity where there was none.
        delta: the δ of both.
        confidence: the probability with which a lower bound above the truth does not happen, in (0, 1).
        canaries: how many records were inserted for it.
        seconds: how long it took.
        version: of the program that did it.
    """

    kind: str
    lower_bound: float
    claimed: float
    delta: float
    confidence: float
    canaries: int
    seconds: float
    version: str

    @staticmethod
    def of(values: object) -> Audit:
        """Returns the audit that a mapping of JSON describes.

        Raises:
            ConfigurationError: for any other keys, or a value out of its range.
        """
        if not isinstance(values, Mapping) or set(values) != set(_KEYS):
            found = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ConfigurationError(f"An audit has exactly the keys {sorted(_KEYS)}, got {found}.")
        kind, version = values["kind"], values["version"]
        if not isinstance(kind, str) or not isinstance(version, str):
            raise ConfigurationError(f"kind and version of an audit must be texts, got {kind!r} and {version!r}.")
        confidence = check_probability("confidence", values["confidence"])
        if not 0.0 < confidence < 1.0:
            raise ConfigurationError(f"confidence must lie between 0 and 1, got {confidence!r}.")
        claimed = values["claimed"]
        return Audit(
            kind=kind,
            lower_bound=check_at_least("lower_bound", values["lower_bound"]),
            claimed=math.inf if claimed in ("inf", math.inf) else check_at_least("claimed", claimed),
            delta=check_probability("delta", values["delta"]),
            confidence=confidence,
            canaries=check_count("canaries", values["canaries"]),
            seconds=check_at_least("seconds", values["seconds"]),
            version=version,
        )

    def to_dict(self) -> dict[str, object]:
        """Returns the audit as plain values."""
        return asdict(self)


def audits_of(values: Iterable[object]) -> tuple[Audit, ...]:
    """Returns the audits that mappings describe; an error names the one it is about."""
    found = []
    for index, each in enumerate(values):
        try:
            found.append(Audit.of(each))
        except ConfigurationError as error:
            raise ConfigurationError(f"Audit {index}: {error}") from error
    return tuple(found)
