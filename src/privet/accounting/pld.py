"""Placeholder until the discretisation lands: the Rényi bound, under the name that callers use."""

from __future__ import annotations

from privet.accounting.rdp import RdpAccountant

__all__ = ["PldAccountant"]


class PldAccountant(RdpAccountant):
    """The Rényi bound for now."""

    name = "pld"
