"""Turns a model's random parts off, wherever it keeps them: in modules, in numbers of modules, in configurations."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["still"]

_RATES = ("drop", "jitter", "mask_time_prob", "mask_feature_prob", "noise_std")
_SWITCHES = ("apply_spec_augment",)


def _turn_off(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and any(rate in name for rate in _RATES):
            setattr(holder, name, 0.0)
        elif isinstance(value, bool) and name in _SWITCHES:
            setattr(holder, name, False)


def still(model: nn.Module) -> nn.Module:
    """Turns dropout, layer dropout, stochastic depth and masks of spectra off; returns the model, in training mode."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for holder in (
            (module, config, *(v for v in vars(config).values() if hasattr(v, "to_dict")))
            if hasattr(config, "to_dict")
            else (module,)
        ):
            _turn_off(holder)
        if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all of torch's own
            module.p = 0.0
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
        if "drop" in type(module).__name__.lower() and isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model
