"""Layers that Opacus has beside torch's own."""

from privet.opacus.layers.dp_multihead_attention import DPMultiheadAttention, SequenceBias
from privet.opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN
from privet.opacus.layers.param_rename import RenameParamsMixin

__all__ = ["DPGRU", "DPLSTM", "DPRNN", "DPMultiheadAttention", "RenameParamsMixin", "SequenceBias"]
