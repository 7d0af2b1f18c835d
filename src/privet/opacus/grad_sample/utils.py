"""The classes of the modes by their names."""

from __future__ import annotations

from typing import Any

from torch import nn

from privet.opacus.grad_sample.fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from privet.opacus.grad_sample.grad_sample_module import GradSampleHooks, GradSampleModule
from privet.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from privet.opacus.grad_sample.other_modes import (
    GradSampleHooksNoOp,
    GradSampleModuleExpandedWeights,
    GradSampleModuleNoOp,
)
from privet.opacus.grad_sample.samplers import register_grad_sampler, register_norm_sampler

__all__ = [
    "get_gsm_class",
    "get_hooks_class",
    "prepare_module",
    "register_grad_sampler",
    "register_norm_sampler",
    "wrap_model",
]

_MODULES: dict[str, type[AbstractGradSampleModule]] = {
    "hooks": GradSampleModule,
    "functorch": GradSampleModule,
    "ew": GradSampleModuleExpandedWeights,
    "ghost": GradSampleModuleFastGradientClipping,
    "no_op": GradSampleModuleNoOp,
}
_HOOKS: dict[str, type[AbstractGradSampleHooks]] = {
    "hooks": GradSampleHooks,
    "functorch": GradSampleHooks,
    "ghost": GradSampleHooksFastGradientClipping,
    "no_op": GradSampleHooksNoOp,
}
_ELSEWHERE = "ghost_fsdp", "ghost_tp", "tp"


def _of_mode(table: dict[str, Any], mode: str) -> Any:
    if mode in table:
        return table[mode]
    hint = (
        " A model that is split over processes trains at privet's own door: wrap it with fully_shard and hand it to "
        "privet.PrivacyEngine."
        if mode in _ELSEWHERE
        else ""
    )
    raise ValueError(f"grad_sample_mode must be one of {', '.join(map(repr, table))}, got {mode!r}.{hint}")


def get_gsm_class(grad_sample_mode: str) -> type[AbstractGradSampleModule]:
    """Returns the class that wraps a module in a mode."""
    found: type[AbstractGradSampleModule] = _of_mode(_MODULES, grad_sample_mode)
    return found


def get_hooks_class(grad_sample_mode: str) -> type[AbstractGradSampleHooks]:
    """Returns the class that is attached to a module in a mode, without wrapping it."""
    found: type[AbstractGradSampleHooks] = _of_mode(_HOOKS, grad_sample_mode)
    return found


def prepare_module(
    model: nn.Module,
    grad_sample_mode: str,
    wrap_model: bool = True,  # noqa: FBT001, FBT002 - Opacus's signature
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns the module wrapped, or hooks that are attached to it.

    Args:
        model: the module.
        grad_sample_mode: `"hooks"`, `"functorch"`, `"ew"`, `"ghost"` or `"no_op"`.
        wrap_model: whether the module is wrapped.
        *args: of the class of the mode.
        **kwargs: likewise.
    """
    if grad_sample_mode == "functorch":
        kwargs["force_functorch"] = True
    kind = get_gsm_class(grad_sample_mode) if wrap_model else get_hooks_class(grad_sample_mode)
    return kind(model, *args, **kwargs)


wrap_model = prepare_module
"""The name of `prepare_module` in older scripts."""
