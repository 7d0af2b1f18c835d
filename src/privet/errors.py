"""Every exception of privet. All derive from `PrivetError` and from the built-in they refine.

PrivetError
├── ConfigurationError (ValueError)     a description that cannot be trained or accounted
├── UnsupportedModelError (ValueError)  a model, or an option of a layer, whose examples cannot be told apart
├── CoverageError (RuntimeError)        a gradient reached a parameter by a way that was not captured
├── ProtocolError (RuntimeError)        calls out of order: a step without a backward, two backwards, ...
├── BudgetExceededError (RuntimeError)  the next step would exceed the budget; raised before it is taken
├── OutOfMemoryError (MemoryError)      memory ran out with the smallest physical batch that there is
├── AccountingError (ArithmeticError)   an accountant could not reach a bound that it can vouch for
├── RanksError (RuntimeError)           ranks of a distributed run that differ, or one that failed or has left
└── LedgerError (ValueError)            a ledger that is damaged, or whose entries do not fit together
"""

__all__ = [
    "AccountingError",
    "BudgetExceededError",
    "ConfigurationError",
    "CoverageError",
    "LedgerError",
    "OutOfMemoryError",
    "PrivetError",
    "ProtocolError",
    "RanksError",
    "UnsupportedModelError",
]


class PrivetError(Exception):
    """Base of every exception that privet raises on purpose."""


class ConfigurationError(PrivetError, ValueError):
    """A description that cannot be trained or accounted, with the value found and the range expected."""


class UnsupportedModelError(PrivetError, ValueError):
    """A model, or an option of one of its layers, whose examples cannot be told apart."""


class CoverageError(PrivetError, RuntimeError):
    """A gradient reached a parameter by a way that was not captured per example."""


class ProtocolError(PrivetError, RuntimeError):
    """Calls in an order that would lose, repeat or leak something."""


class BudgetExceededError(PrivetError, RuntimeError):
    """The next step would exceed the privacy budget. Raised before the step, so nothing was spent."""


class OutOfMemoryError(PrivetError, MemoryError):
    """Memory ran out with the smallest physical batch that there is; the sizes tried are in the message."""


class AccountingError(PrivetError, ArithmeticError):
    """An accountant could not reach a bound that it can vouch for."""


class LedgerError(PrivetError, ValueError):
    """A ledger that is damaged, or whose entries do not fit together."""


class RanksError(PrivetError, RuntimeError):
    """Ranks of a distributed run differ where they must not, or one of them failed or has left."""
