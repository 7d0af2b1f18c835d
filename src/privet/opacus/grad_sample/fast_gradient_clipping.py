"""Ghost clipping at Opacus's names: norms of per-example gradients after a backward, and sums without the gradients."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privet.clipping import ClippingPolicy
from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.summation import clipped_sum, squared_norms
from privet.gradients.use import Recorded
from privet.opacus.grad_sample.grad_sample_module import GradSampleHooks
from privet.opacus.grad_sample.gsm_base import AbstractGradSampleModule
from privet.opacus.grad_sample.samplers import NORM_SAMPLERS
from privet.opacus.modules import trainable_parameters

__all__ = ["GradSampleHooksFastGradientClipping", "GradSampleModuleFastGradientClipping"]


class GradSampleHooksFastGradientClipping(GradSampleHooks):
    """Keeps the norms of per-example gradients after each backward, and what their clipped sum is formed of.

    No per-example gradient is kept, and no ordinary one: `p.grad` and `p.grad_sample` stay None until the step.

    Args:
        m: the module.
        batch_first: whether inputs have the batch on axis 0, else on axis 1.
        loss_reduction: whether losses are the mean or the sum over the examples.
        strict: whether a trainable layer with buffers is refused.
        force_functorch: whether all norms come from vmap, and none from a rule for a layer.
        max_grad_norm: the clip norm of `get_clipping_coef`; the optimizer clips to its own.
        use_ghost_clipping: kept for scripts that give it: each layer's rule takes the cheaper way.
    """

    NORM_SAMPLERS: ClassVar[dict[type, Any]] = NORM_SAMPLERS

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ) -> None:
        super().__init__(
            m, batch_first=batch_first, loss_reduction=loss_reduction, strict=strict, force_functorch=force_functorch
        )
        self._begin(max_grad_norm, use_ghost_clipping=use_ghost_clipping)

    def _begin(self, max_grad_norm: float, *, use_ghost_clipping: bool) -> None:
        self.max_grad_norm = max_grad_norm
        self.use_ghost_clipping = use_ghost_clipping
        self.trainable_parameters = [p for _, p in trainable_parameters(self._module)]
        self._per_sample_gradient_norms: Tensor | None = None
        self._recorded: Recorded | None = None

    def _received(self, recorded: Recorded) -> None:
        examples, trainable = recorded.examples or 0, dict(trainable_parameters(self._module))
        scale = self._scale(examples)
        norms = squared_norms(recorded, trainable)
        for listener in self._after:
            listener(examples)
        for name, p in trainable.items():
            found = norms.get(name)
            p._norm_sample = p.new_zeros(examples) if found is None else (found.sqrt() * scale).to(p.dtype)  # type: ignore[attr-defined]  # noqa: SLF001 - Opacus's name
            p.grad_sample = None  # type: ignore[attr-defined]
        self._recorded = recorded

    def take_clipped(self, policy: ClippingPolicy, names: dict[str, nn.Parameter]) -> tuple[ClippedSum, int]:
        """Returns the clipped sum of the last backward and its number of examples, and forgets both. For the criterion.

        Raises:
            ProtocolError: if there was no backward since the last one.
        """
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            raise ProtocolError(
                "there is nothing to clip: no backward went through the private model. Expected a loss that was "
                "computed from its outputs, in train() mode, with the hooks enabled."
            )
        examples = recorded.examples or 0
        return clipped_sum(recorded, names, policy, scale=self._scale(examples)), examples

    def get_norm_sample(self) -> Tensor:
        """Returns each example's gradient norm, (B,). It is not private: look, and do not publish."""
        norms = [p._norm_sample for p in self.trainable_parameters]  # type: ignore[attr-defined]  # noqa: SLF001 - Opacus's name
        found: Tensor = torch.stack([norm.to(norms[0].device) for norm in norms]).norm(2, dim=0)
        self.per_sample_gradient_norms = found
        return found

    def get_clipping_coef(self) -> Tensor:
        """Returns the factor that clips each example to `max_grad_norm`, (B,)."""
        factor: Tensor = self.max_grad_norm / (self.get_norm_sample() + 1e-6)
        return factor.clamp(max=1.0)

    @property
    def per_sample_gradient_norms(self) -> Tensor:
        """Returns the norms that `get_norm_sample` found last; raises AttributeError before that."""
        if self._per_sample_gradient_norms is None:
            raise AttributeError("per_sample_gradient_norms is not set: call get_norm_sample() after a backward.")
        return self._per_sample_gradient_norms

    @per_sample_gradient_norms.setter
    def per_sample_gradient_norms(self, value: Tensor) -> None:
        self._per_sample_gradient_norms = value


class GradSampleModuleFastGradientClipping(GradSampleHooksFastGradientClipping, AbstractGradSampleModule):
    """Wraps a module for ghost clipping. See `GradSampleHooksFastGradientClipping`."""

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        max_grad_norm: float = 1,
        use_ghost_clipping: bool = True,
    ) -> None:
        AbstractGradSampleModule.__init__(self, m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._watch(strict=strict, force_functorch=force_functorch)
        self._begin(max_grad_norm, use_ghost_clipping=use_ghost_clipping)
