"""Accountants: what a history of steps costs."""

from privet.opacus.accountants.accountant import IAccountant
from privet.opacus.accountants.gdp import GaussianAccountant
from privet.opacus.accountants.prv import PRVAccountant
from privet.opacus.accountants.rdp import RDPAccountant
from privet.opacus.accountants.registry import create_accountant, register_accountant

__all__ = [
    "GaussianAccountant",
    "IAccountant",
    "PRVAccountant",
    "RDPAccountant",
    "create_accountant",
    "register_accountant",
]
