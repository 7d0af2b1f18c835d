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
    from privet.accounting import Accountant, Budget, FileLedger, Ledger, Relation, Unit, register_accountant
    from privet.clipping import PSAC, Adaptive, Automatic, ClippingPolicy, Flat, GroupWise, PerLayer
    from privet.engine import PrivacyEngine
    from privet.gradients import register_rule, rows_of
    from privet.learning import (
        AdamBC,
        Augmented,
        RandomCrop,
        SharpnessAware,
        WeightAverage,
        norm_quantile,
        private_moments,
        private_quantile,
    )
    from privet.mechanism import Mechanism
    from privet.noise import BLT, BandMF, DiscreteGaussian, Gaussian, LambdaCGD, Noise, SeveralReleases
    from privet.sampling import (
        CyclicPoisson,
        DrawnSchedule,
        FixedSize,
        Partition,
        Poisson,
        RandomAllocation,
        Sampling,
        Stream,
        TruncatedPoisson,
        Users,
    )
    from privet.schedules import Exponential, Listed, Plan, Schedule, Stepwise
    from privet.step import PrivateStep
    from privet.training.accumulate import Accumulate
    from privet.training.chained import ChainedOptimizer
    from privet.training.loggers import CSVLogger, TensorBoardLogger
    from privet.training.performance import Performance
    from privet.training.statistics import StepStatistics
    from privet.training.virtual_steps import BatchMemoryManager
    from privet.validation import get_compatible_module, validate

__all__ = [
    "BLT",
    "PSAC",
    "Accountant",
    "AccountingError",
    "Accumulate",
    "AdamBC",
    "Adaptive",
    "Augmented",
    "Automatic",
    "BandMF",
    "BatchMemoryManager",
    "Budget",
    "BudgetExceededError",
    "CSVLogger",
    "ChainedOptimizer",
    "ClippingPolicy",
    "ConfigurationError",
    "CoverageError",
    "CyclicPoisson",
    "DiscreteGaussian",
    "DrawnSchedule",
    "Exponential",
    "FileLedger",
    "FixedSize",
    "Flat",
    "Gaussian",
    "GroupWise",
    "LambdaCGD",
    "Ledger",
    "LedgerError",
    "Listed",
    "Mechanism",
    "Noise",
    "OutOfMemoryError",
    "Partition",
    "PerLayer",
    "Performance",
    "Plan",
    "Poisson",
    "PrivacyEngine",
    "PrivateStep",
    "PrivetError",
    "ProtocolError",
    "RandomAllocation",
    "RandomCrop",
    "Relation",
    "Sampling",
    "Schedule",
    "SeveralReleases",
    "SharpnessAware",
    "StepStatistics",
    "Stepwise",
    "Stream",
    "TensorBoardLogger",
    "TruncatedPoisson",
    "Unit",
    "UnsupportedModelError",
    "Users",
    "WeightAverage",
    "get_compatible_module",
    "norm_quantile",
    "private_moments",
    "private_quantile",
    "register_accountant",
    "register_rule",
    "rows_of",
    "validate",
]

__version__ = "0.1.0"

_HOMES = {
    "BLT": "privet.noise",
    "PSAC": "privet.clipping",
    "Accountant": "privet.accounting",
    "Accumulate": "privet.training.accumulate",
    "AdamBC": "privet.learning",
    "Adaptive": "privet.clipping",
    "Augmented": "privet.learning",
    "Automatic": "privet.clipping",
    "BandMF": "privet.noise",
    "BatchMemoryManager": "privet.training.virtual_steps",
    "Budget": "privet.accounting",
    "CSVLogger": "privet.training.loggers",
    "ChainedOptimizer": "privet.training.chained",
    "ClippingPolicy": "privet.clipping",
    "CyclicPoisson": "privet.sampling",
    "DiscreteGaussian": "privet.noise",
    "DrawnSchedule": "privet.sampling",
    "Exponential": "privet.schedules",
    "FileLedger": "privet.accounting",
    "FixedSize": "privet.sampling",
    "Flat": "privet.clipping",
    "Gaussian": "privet.noise",
    "GroupWise": "privet.clipping",
    "LambdaCGD": "privet.noise",
    "Ledger": "privet.accounting",
    "Listed": "privet.schedules",
    "Mechanism": "privet.mechanism",
    "Noise": "privet.noise",
    "Partition": "privet.sampling",
    "PerLayer": "privet.clipping",
    "Performance": "privet.training.performance",
    "Plan": "privet.schedules",
    "Poisson": "privet.sampling",
    "PrivacyEngine": "privet.engine",
    "PrivateStep": "privet.step",
    "RandomAllocation": "privet.sampling",
    "RandomCrop": "privet.learning",
    "Relation": "privet.accounting",
    "Sampling": "privet.sampling",
    "Schedule": "privet.schedules",
    "SeveralReleases": "privet.noise",
    "SharpnessAware": "privet.learning",
    "StepStatistics": "privet.training.statistics",
    "Stepwise": "privet.schedules",
    "Stream": "privet.sampling",
    "TensorBoardLogger": "privet.training.loggers",
    "TruncatedPoisson": "privet.sampling",
    "Unit": "privet.accounting",
    "Users": "privet.sampling",
    "WeightAverage": "privet.learning",
    "get_compatible_module": "privet.validation",
    "norm_quantile": "privet.learning",
    "private_moments": "privet.learning",
    "private_quantile": "privet.learning",
    "register_accountant": "privet.accounting",
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
