"""What all ways of computing per-example gradients have in common, at Opacus's names."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from privet.opacus.modules import trainable_parameters

__all__ = ["AbstractGradSampleHooks", "AbstractGradSampleModule"]

logger = logging.getLogger(__name__)
_ATTRIBUTES = ("grad_sample", "summed_grad", "_norm_sample")


class AbstractGradSampleHooks(ABC):
    """Attached to a module, so that its trainable parameters have an attribute `grad_sample`.

    Args:
        m: the module.
        batch_first: whether inputs have the batch on axis 0, else on axis 1.
        loss_reduction: whether losses are the mean or the sum over the examples.
    """

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        self._module = m
        self.batch_first = batch_first
        self.loss_reduction = loss_reduction
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
        for _, p in trainable_parameters(m):
            p.grad_sample = None  # type: ignore[attr-defined]

    def set_grad_sample_to_none(self) -> None:
        """Forgets all per-example gradients."""
        for p in self._module.parameters():
            p.grad_sample = None  # type: ignore[attr-defined]

    def del_grad_sample(self) -> None:
        """Deletes the attribute of every parameter."""
        for p in self._module.parameters():
            if hasattr(p, "grad_sample"):
                del p.grad_sample

    def forbid_grad_accumulation(self) -> None:  # noqa: B027 - only some modes know
        """Makes a second backward before the optimizer's step an error, where this is known."""

    def allow_grad_accumulation(self) -> None:  # noqa: B027
        """Makes several backwards before the optimizer's step add to `grad_sample`, as a list."""

    @abstractmethod
    def remove_hooks(self) -> None:
        """Makes the module an ordinary one again."""

    def cleanup(self) -> None:
        """Makes the module an ordinary one again, and takes all attributes from its parameters."""
        try:
            self.remove_hooks()
        except Exception:  # attributes go in any case, as Opacus's do
            logger.warning("the hooks could not be removed; the attributes are", exc_info=True)
        for p in self._module.parameters():
            for name in _ATTRIBUTES:
                if hasattr(p, name):
                    delattr(p, name)


class AbstractGradSampleModule(nn.Module, AbstractGradSampleHooks, ABC):
    """Wraps a module, whose trainable parameters then have `grad_sample`. See `AbstractGradSampleHooks`."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        nn.Module.__init__(self)
        AbstractGradSampleHooks.__init__(self, m, batch_first=batch_first, loss_reduction=loss_reduction)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the wrapped module returns."""
        return self._module(*args, **kwargs)

    def __getattr__(self, item: str) -> Any:
        """Returns an attribute, or the part of the wrapped module at this path."""
        try:
            return super().__getattr__(item)
        except AttributeError:
            parts = dict(self._modules["_module"].named_modules()) if "_module" in self._modules else {}  # type: ignore[union-attr]
            if item and item in parts:
                return parts[item]
            raise

    def zero_grad(self, set_to_none: bool = False) -> None:  # noqa: FBT001, FBT002 - Opacus's signature
        """Forgets ordinary and per-example gradients."""
        self.set_grad_sample_to_none()
        super().zero_grad(set_to_none)

    def to_standard_module(self) -> nn.Module:
        """Returns the wrapped module, as an ordinary one."""
        self._close()
        return self._module

    def _close(self) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        """Returns the class's name around that of the wrapped module."""
        return f"{type(self).__name__}({self._module!r})"
