"""Batch norms: refused, and replaced by group or instance norm."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privet.opacus.validators.errors import ShouldReplaceModuleError, UnsupportableModuleError, UnsupportedModuleError
from privet.opacus.validators.utils import register_module_fixer, register_module_validator

__all__ = ["fix", "validate"]

logger = logging.getLogger(__name__)
_CLASSES = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
_INSTANCE = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}


@register_module_validator(_CLASSES)
def validate(module: _BatchNorm) -> list[UnsupportedModuleError]:
    """Returns one error: the statistics of a batch mix its examples."""
    return [
        ShouldReplaceModuleError(
            f"{type(module).__name__} normalises an example by the others of its batch, so that no gradient belongs to "
            "one example alone. Use GroupNorm, LayerNorm or InstanceNorm; ModuleValidator.fix puts one there."
        )
    ]


@register_module_fixer(_CLASSES)
def fix(module: _BatchNorm, **kwargs: Any) -> nn.Module:
    """Returns a group norm of `num_groups`, by default gcd(32, features); or an instance norm (`replace_bn_with_in`).

    Raises:
        ValueError: if both options are given.
        UnsupportableModuleError: for an instance norm in place of SyncBatchNorm.
    """
    logger.info(
        "The default batch_norm fixer replaces BatchNorm with GroupNorm; replace_bn_with_in=True takes another."
    )
    by_instance, groups = kwargs.get("replace_bn_with_in", False), kwargs.get("num_groups")
    if by_instance and groups is not None:
        raise ValueError("replace_bn_with_in and num_groups ask for two replacements. Give one of them.")
    if not by_instance:
        count = math.gcd(32, module.num_features) if groups is None else groups
        return nn.GroupNorm(count, module.num_features, affine=module.affine)
    if type(module) not in _INSTANCE:
        raise UnsupportableModuleError(
            f"there is no instance norm of the kind of {type(module).__name__}: leave the option away."
        )
    return _INSTANCE[type(module)](module.num_features)
