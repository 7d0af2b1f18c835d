"""Recurrent and attention layers: Opacus asks for its own; the core trains either, and weights are just moved."""

from __future__ import annotations

from typing import Any

from torch import nn

from privet.opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from privet.opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError
from privet.opacus.validators.utils import register_module_fixer, register_module_validator

__all__ = ["fix_attention", "fix_gru", "fix_lstm", "validate"]


@register_module_validator([nn.LSTM, nn.GRU, nn.MultiheadAttention])
def validate(module: nn.Module) -> list[UnsupportedModuleError]:
    """Returns one error, as scripts written for Opacus expect it."""
    name = type(module).__name__
    return [ShouldReplaceModuleError(f"{name} is written as DP{name} in Opacus; ModuleValidator.fix puts that there.")]


def _recurrent(kind: Any, module: nn.RNNBase) -> nn.RNNBase:
    options: dict[str, Any] = {
        name: getattr(module, name)
        for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
        if name != "proj_size" or module.proj_size
    }
    fixed: nn.RNNBase = kind(module.input_size, module.hidden_size, **options)
    fixed.load_state_dict(module.state_dict())
    return fixed


@register_module_fixer(nn.LSTM)
def fix_lstm(module: nn.LSTM) -> nn.Module:
    """Returns a DPLSTM with the same weights."""
    return _recurrent(DPLSTM, module)


@register_module_fixer(nn.GRU)
def fix_gru(module: nn.GRU) -> nn.Module:
    """Returns a DPGRU with the same weights."""
    return _recurrent(DPGRU, module)


@register_module_fixer(nn.MultiheadAttention)
def fix_attention(module: nn.MultiheadAttention) -> nn.Module:
    """Returns a DPMultiheadAttention with the same weights."""
    fixed = DPMultiheadAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
    )
    fixed.load_state_dict(module.state_dict())
    return fixed
