"""Accountants by name."""

from __future__ import annotations

from privet.opacus.accountants.accountant import IAccountant
from privet.opacus.accountants.gdp import GaussianAccountant
from privet.opacus.accountants.prv import PRVAccountant
from privet.opacus.accountants.rdp import RDPAccountant

__all__ = ["create_accountant", "register_accountant"]

_ACCOUNTANTS: dict[str, type[IAccountant]] = {
    "rdp": RDPAccountant,
    "gdp": GaussianAccountant,
    "prv": PRVAccountant,
}


def register_accountant(
    mechanism: str,
    accountant: type[IAccountant],
    force: bool = False,  # noqa: FBT001, FBT002 - Opacus's signature
) -> None:
    """Registers a class under a name. Raises ValueError if the name is taken, unless `force`."""
    if mechanism in _ACCOUNTANTS and not force:
        raise ValueError(f"an accountant is registered as {mechanism!r} already. Give force=True to replace it.")
    _ACCOUNTANTS[mechanism] = accountant


def create_accountant(mechanism: str) -> IAccountant:
    """Returns a new accountant of the class that is registered under a name. Raises ValueError if none is."""
    if mechanism not in _ACCOUNTANTS:
        raise ValueError(
            f"no accountant is registered as {mechanism!r}. Expected one of {', '.join(map(repr, _ACCOUNTANTS))}."
        )
    return _ACCOUNTANTS[mechanism]()
