"""Differentially private training of PyTorch models: fast, exact, accounted as run.

Names load when they are first used (PEP 562), so that `import privet.accounting` pulls in neither torch nor the heavy
parts of SciPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from privet.errors import (
    AccountingError,
    BudgetExceededError,
    ConfigurationError,
    CoverageError,
    LedgerError,
    OutOfMemoryError,
    PrivetError,
    ProtocolError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from privet.clipping import Flat, PerLayer
    from privet.engine import PrivacyEngine
    from privet.gradients import register_rule, rows_of
    from privet.mechanism import Gaussian, Mechanism
    from privet.sampling import Poisson
    from privet.step import PrivateStep
    from privet.training.virtual_steps import BatchMemoryManager
    from privet.validation import validate

__all__ = [
    "AccountingError",
    "BatchMemoryManager",
    "BudgetExceededError",
    "ConfigurationError",
    "CoverageError",
    "Flat",
    "Gaussian",
    "LedgerError",
    "Mechanism",
    "OutOfMemoryError",
    "PerLayer",
    "Poisson",
    "PrivacyEngine",
    "PrivateStep",
    "PrivetError",
    "ProtocolError",
    "UnsupportedModelError",
    "register_rule",
    "rows_of",
    "validate",
]

__version__ = "0.1.0"

_HOMES = {
    "BatchMemoryManager": "privet.training.virtual_steps",
    "Flat": "privet.clipping",
    "Gaussian": "privet.mechanism",
    "Mechanism": "privet.mechanism",
    "PerLayer": "privet.clipping",
    "Poisson": "privet.sampling",
    "PrivacyEngine": "privet.engine",
    "PrivateStep": "privet.step",
    "register_rule": "privet.gradients",
    "rows_of": "privet.gradients",
    "validate": "privet.validation",
}


def __getattr__(name: str) -> object:
    """Returns the public name from the module that defines it, and keeps it for the next time."""
    if name not in _HOMES:
        raise AttributeError(f"module 'privet' has no attribute {name!r}; its names are {', '.join(__all__)}.")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Returns the public names, loaded or not."""
    return sorted({*__all__, *globals()})
