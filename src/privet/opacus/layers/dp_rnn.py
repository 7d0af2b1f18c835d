"""Recurrent layers at Opacus's names: torch's own, which the core knows, with the same arguments and state."""

from __future__ import annotations

from torch import nn

__all__ = ["DPGRU", "DPLSTM", "DPRNN"]


class DPRNN(nn.RNN):
    """torch's `nn.RNN`, trained by the core as it is."""


class DPGRU(nn.GRU):
    """torch's `nn.GRU`, trained by the core as it is."""


class DPLSTM(nn.LSTM):
    """torch's `nn.LSTM`, trained by the core as it is."""
