"""The modes of Opacus beside hooks: expanded weights, which are the hooks here, and no gradients at all."""

from __future__ import annotations

from typing import Any

from torch import nn

from privet.opacus.grad_sample.grad_sample_module import GradSampleModule
from privet.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule

__all__ = ["GradSampleHooksNoOp", "GradSampleModuleExpandedWeights", "GradSampleModuleNoOp"]


class GradSampleModuleExpandedWeights(GradSampleModule):
    """`GradSampleModule`, under the name of Opacus's mode "ew": the core's rules take the place of torch's."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise NotImplementedError("the mode 'ew' has the batch on axis 0. Use grad_sample_mode='hooks'.")
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)


class GradSampleHooksNoOp(AbstractGradSampleHooks):
    """Only gives the parameters the attribute `grad_sample`, which you fill yourself."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise NotImplementedError("the mode 'no_op' has the batch on axis 0.")
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)

    def remove_hooks(self) -> None:
        """Does nothing: there are no hooks."""


class GradSampleModuleNoOp(GradSampleHooksNoOp, AbstractGradSampleModule):
    """Wraps a module and only gives its parameters the attribute `grad_sample`."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise NotImplementedError("the mode 'no_op' has the batch on axis 0.")
        AbstractGradSampleModule.__init__(self, m, batch_first=batch_first, loss_reduction=loss_reduction)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module's forward returns."""
        return self._module.forward(*args, **kwargs)
