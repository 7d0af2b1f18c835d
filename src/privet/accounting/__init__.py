"""Accounting: the tightest honest ε for what really ran. NumPy and SciPy's special functions only; never torch."""

from __future__ import annotations

from privet.accounting.accountant import (
    Accountant,
    Bound,
    get_accountant,
    get_delta,
    get_epsilon,
    known_accountants,
    register_accountant,
)
from privet.accounting.budget import Budget
from privet.accounting.calibration import (
    Certificate,
    calibrate_count_noise,
    calibrate_noise_multiplier,
    calibrate_rate,
    calibrate_steps,
)
from privet.accounting.correlated import CorrelatedEvent, CorrelatedRelease, in_one_participation
from privet.accounting.discrete import DiscreteGaussianEvent
from privet.accounting.event import (
    ClipCountEvent,
    ComposedEvent,
    Event,
    FixedSizeEvent,
    GaussianEvent,
    NegativeBinomialSelectionEvent,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    PoissonSelectionEvent,
    RandomAllocationEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
    Unit,
    WholePhase,
    repeated,
)
from privet.accounting.file_ledger import FileLedger
from privet.accounting.gdp import GdpAccountant
from privet.accounting.ledger import AbstractLedger, Ledger
from privet.accounting.phases import Phase
from privet.accounting.pld import PldAccountant
from privet.accounting.rdp import RdpAccountant
from privet.accounting.read_ledger import read_ledger
from privet.accounting.role import LedgerLike
from privet.accounting.toeplitz import Toeplitz

__all__ = [
    "AbstractLedger",
    "Accountant",
    "Bound",
    "Budget",
    "Certificate",
    "ClipCountEvent",
    "ComposedEvent",
    "CorrelatedEvent",
    "CorrelatedRelease",
    "DiscreteGaussianEvent",
    "Event",
    "FileLedger",
    "FixedSizeEvent",
    "GaussianEvent",
    "GdpAccountant",
    "Ledger",
    "LedgerLike",
    "NegativeBinomialSelectionEvent",
    "NoEvent",
    "NonPrivateEvent",
    "PartitionEvent",
    "Phase",
    "PldAccountant",
    "PoissonEvent",
    "PoissonSelectionEvent",
    "RandomAllocationEvent",
    "RdpAccountant",
    "Relation",
    "SelfComposedEvent",
    "Toeplitz",
    "TruncatedPoissonEvent",
    "Unit",
    "WholePhase",
    "calibrate_count_noise",
    "calibrate_noise_multiplier",
    "calibrate_rate",
    "calibrate_steps",
    "get_accountant",
    "get_delta",
    "get_epsilon",
    "in_one_participation",
    "known_accountants",
    "read_ledger",
    "register_accountant",
    "repeated",
]

register_accountant("gdp", GdpAccountant)
register_accountant("pld", PldAccountant)
register_accountant("rdp", RdpAccountant)
