"""Facts as plain values for JSON, in full precision. JSON has no infinity: it becomes the text "inf"."""

from __future__ import annotations

import math
from collections.abc import Mapping

from privet.report.described import described
from privet.report.facts import Facts
from privet.report.hazards import hazards

__all__ = ["VERSION", "data_of"]

VERSION = 1
"""Of the form of the JSON, which `schema.json` describes."""


def data_of(facts: Facts) -> dict[str, object]:
    """Returns the report as plain values that JSON keeps exactly."""
    bound = facts.epsilon
    values: dict[str, object] = {
        "report": "privet",
        "version": VERSION,
        "created": facts.created,
        "software": dict(facts.versions),
        "ledger": {
            "digest": facts.digest,
            "relation": facts.relation,
            "unit": facts.unit,
            "runs": facts.runs,
            "steps": facts.steps,
            "marks": list(facts.marks),
        },
        "guarantee": {
            "epsilon": bound.upper,
            "epsilon_lower_bound": bound.lower,
            "delta": facts.delta,
            "accountant": facts.accountant,
            "method": bound.method,
            "notes": list(bound.notes),
        },
        "curve": [{"delta": delta, "epsilon": epsilon} for delta, epsilon in facts.curve],
        "mu": {"value": facts.mu, "smallest_delta": facts.smallest_delta},
        "attacks": [{"false_positive_rate": rate, "true_positive_rate": power} for rate, power in facts.attacks],
        "phases": [
            {"event": phase.event.to_dict(), "count": phase.count, **vars(described(phase.event))}
            for phase in facts.phases
        ],
        "dataset_size": facts.dataset_size,
        "declarations": dict(facts.declarations),
        "hazards": [{"name": each.name, "status": each.status.value, "detail": each.detail} for each in hazards(facts)],
        "audits": [{**audit.to_dict(), "epsilon": epsilon} for audit, epsilon in facts.audits],
        "note": facts.note,
    }
    plain = _plain(values)
    assert isinstance(plain, dict)
    return plain


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
