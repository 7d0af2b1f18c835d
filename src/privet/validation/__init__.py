"""What a model may not do under differential privacy, why, and what takes its place."""

from __future__ import annotations

from privet.validation.fix import get_compatible_module
from privet.validation.norms import FixedNorm
from privet.validation.probe import find_mixing, refuse_mixing
from privet.validation.records import refuse_mixed_records
from privet.validation.rules import Issue, is_compatible, require_valid, validate

__all__ = [
    "FixedNorm",
    "Issue",
    "find_mixing",
    "get_compatible_module",
    "is_compatible",
    "refuse_mixed_records",
    "refuse_mixing",
    "require_valid",
    "validate",
]
