"""Instance norms: refused where they keep statistics of the data."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from privet.opacus.modules import clone_module
from privet.opacus.validators.errors import IllegalModuleConfigurationError, UnsupportedModuleError
from privet.opacus.validators.utils import register_module_fixer, register_module_validator

__all__ = ["fix", "validate"]

_CLASSES = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]


@register_module_validator(_CLASSES)
def validate(module: _InstanceNorm) -> list[UnsupportedModuleError]:
    """Returns one error if running statistics are kept."""
    if not module.track_running_stats:
        return []
    return [
        IllegalModuleConfigurationError(
            f"{type(module).__name__} writes statistics of the data into the model, without noise. Set "
            "track_running_stats=False; ModuleValidator.fix does."
        )
    ]


@register_module_fixer(_CLASSES)
def fix(module: _InstanceNorm) -> nn.Module:
    """Returns the module itself, or a copy without running statistics."""
    if not validate(module):
        return module
    fixed: Any = clone_module(module)
    fixed.track_running_stats = False
    fixed.running_mean = fixed.running_var = fixed.num_batches_tracked = None
    return fixed  # type: ignore[no-any-return]
