"""What all results of audits have in common: plain values for JSON, and the version that made them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

__all__ = ["as_json", "version_of_privet"]


def as_json(values: Mapping[str, Any]) -> str:
    """Returns values as JSON; an infinite number becomes the string "inf", which JSON has no number for."""
    return json.dumps({name: _plain(value) for name, value in values.items()}, indent=2)


def version_of_privet() -> str:
    """Returns the installed version, or "unknown" where privet runs from a folder."""
    try:
        return version("privet")
    except PackageNotFoundError:
        return "unknown"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and math.isinf(value) else value
