"""Per-example gradients of any module, on its parameters after each backward: by the core's capture and rules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from privet.gradients.summation import per_example_gradients
from privet.gradients.use import Recorded
from privet.opacus.declared_loss import DeclaredLoss
from privet.opacus.grad_sample.gsm_base import AbstractGradSampleHooks, AbstractGradSampleModule
from privet.opacus.grad_sample.instrument import ForgivingInstrument
from privet.opacus.grad_sample.samplers import GRAD_SAMPLERS
from privet.opacus.modules import trainable_modules, trainable_parameters

__all__ = ["GradSampleHooks", "GradSampleModule", "create_or_accumulate_grad_sample"]

_MARK = "autograd_grad_sample_hooks"


def create_or_accumulate_grad_sample(*, param: Any, grad_sample: Tensor, max_batch_len: int) -> None:
    """Adds rows to `param._current_grad_sample`, of `max_batch_len` rows in all; for grad samplers that do so."""
    if not param.requires_grad:
        return
    if not hasattr(param, "_current_grad_sample"):
        param._current_grad_sample = grad_sample.new_zeros(max_batch_len, *grad_sample.shape[1:])  # noqa: SLF001
    param._current_grad_sample[: len(grad_sample)] += grad_sample  # noqa: SLF001


class GradSampleHooks(AbstractGradSampleHooks):
    """Puts per-example gradients on the parameters of a module, which stays as it is.

    After each backward, `p.grad_sample` has the rows `(B, *p.shape)` of the batch, and `p.grad` the ordinary gradient.
    Several backwards without `zero_grad` make `p.grad_sample` a list of tensors. A parameter that had no part in the
    loss has rows of zeros: whether it was used may depend on the data.

    The first batch is held against autograd, and no gradient reaches a parameter by a way that was not captured.

    Args:
        m: the module.
        batch_first: whether inputs have the batch on axis 0, else on axis 1.
        loss_reduction: whether losses are the mean or the sum over the examples.
        strict: whether a trainable layer with buffers is refused.
        force_functorch: whether all rows come from vmap, and none from a rule for a layer.

    Raises:
        NotImplementedError: for a trainable layer with buffers, if `strict`.
    """

    GRAD_SAMPLERS: ClassVar[dict[type, Any]] = GRAD_SAMPLERS

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._watch(strict=strict, force_functorch=force_functorch)

    def _watch(self, *, strict: bool, force_functorch: bool) -> None:
        self.validate(self._module, strict=strict)
        self.force_functorch = force_functorch
        self.grad_accumulation_allowed = True
        self._before: list[Callable[[list[Tensor], bool], None]] = []
        self._after: list[Callable[[int], None]] = []
        self._check: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        self._losses: DeclaredLoss | None = None
        self._ordinary: dict[str, Tensor] = {}
        self._instrument: ForgivingInstrument | None = None
        self.hooks_enabled = False
        self.add_hooks()

    # -- hooks -------------------------------------------------------------------------------------------------------

    def add_hooks(
        self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False
    ) -> None:
        """Begins to watch the module. The options are those that the object was made with.

        Raises:
            ValueError: if it is watched already.
        """
        if hasattr(self._module, _MARK):
            raise ValueError(f"Trying to add hooks twice to the same model ({type(self._module).__name__}).")
        setattr(self._module, _MARK, [self])
        self.enable_hooks()

    def remove_hooks(self) -> None:
        """Makes the module an ordinary one again. Attributes of parameters stay; see `cleanup`."""
        self.disable_hooks()
        if hasattr(self._module, _MARK):
            delattr(self._module, _MARK)

    def enable_hooks(self) -> None:
        """Watches forwards from now on."""
        if self._instrument is None and hasattr(self._module, _MARK):
            parameters = dict(trainable_parameters(self._module))
            if parameters:
                self._instrument = ForgivingInstrument(
                    self._module,
                    parameters,
                    batch_first=self.batch_first,
                    mapped=self.force_functorch,
                    on_backward=self._received,
                    on_check=lambda args, kwargs: None if self._check is None else self._check(args, kwargs),
                    losses=self._losses,
                    on_forward=self._given,
                )
        self.hooks_enabled = True

    def disable_hooks(self) -> None:
        """Lets forwards be ordinary ones from now on: gradients without privacy reach the parameters."""
        if self._instrument is not None:
            self._instrument.remove()
            self._instrument = None
        self._ordinary.clear()
        self.hooks_enabled = False

    def watch_for(
        self,
        *,
        before: Callable[[list[Tensor], bool], None],
        after: Callable[[int], None],
        check: Callable[[tuple[Any, ...], dict[str, Any]], None],
        losses: DeclaredLoss | None,
    ) -> None:
        """Tells a private optimizer of every batch, and asks more of the model. For the engine.

        Args:
            before: gets all tensors that a forward is given, and whether it is the first of its backward.
            after: gets the number of examples of each backward.
            check: gets the arguments of the first batch, to find a model that mixes examples.
            losses: looks at the loss.
        """
        self._before.append(before)
        self._after.append(after)
        self._check, self._losses = check, losses
        if self.hooks_enabled:
            self.disable_hooks()
            self.enable_hooks()

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _given(self, tensors: list[Tensor], anew: bool) -> None:  # noqa: FBT001 - as the instrument calls it
        for listener in self._before:
            listener(tensors, anew)

    def _scale(self, examples: int) -> float:
        mean = self.loss_reduction == "mean" if self._losses is None else self._losses.mean
        return float(max(examples, 1)) if mean else 1.0

    def _received(self, recorded: Recorded) -> None:
        """Puts the rows of one backward on the parameters."""
        examples, trainable = recorded.examples or 0, dict(trainable_parameters(self._module))
        if not self.grad_accumulation_allowed and any(_held(p) for p in trainable.values()):
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation: a second backward came before the step. "
                "Call optimizer.step() and zero_grad() after every backward, or use BatchMemoryManager."
            )
        scale = self._scale(examples)
        rows = per_example_gradients(recorded, trainable, scale=scale)
        for listener in self._after:
            listener(examples)
        for name, p in trainable.items():
            found = rows.pop(name, None)
            mine = p.new_zeros(examples, *p.shape) if found is None else found.view(examples, *p.shape).to(p.dtype)
            held = getattr(p, "grad_sample", None)
            p.grad_sample = mine if held is None else [*(held if isinstance(held, list) else [held]), mine]  # type: ignore[attr-defined]
            # The forward has taken away what was in p.grad: that of the backwards before is kept here.
            before = None if held is None else self._ordinary.get(name)
            p.grad = self._ordinary[name] = mine.sum(0) / scale + (0.0 if before is None else before)

    # -- what is asked of the model ----------------------------------------------------------------------------------

    @classmethod
    def is_supported(cls, module: nn.Module) -> bool:  # noqa: ARG003 - Opacus's signature
        """Returns True: no layer needs a grad sampler of its own."""
        warnings.warn("every layer is supported; is_supported is deprecated", DeprecationWarning, stacklevel=2)
        return True

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        """Returns an error for every trainable layer with buffers; raises them if `strict`."""
        errors = [
            NotImplementedError(f"the trainable layer {name} ({type(part).__name__}) has buffers, which may keep data")
            for name, part in trainable_modules(module)
            if any(True for _ in part.buffers())
        ]
        if errors and strict:
            raise NotImplementedError(errors)
        return errors

    def forbid_grad_accumulation(self) -> None:
        """Makes a second backward before the optimizer's step an error."""
        self.grad_accumulation_allowed = False

    def allow_grad_accumulation(self) -> None:
        """Makes several backwards before the optimizer's step add to `grad_sample`, as a list."""
        self.grad_accumulation_allowed = True


def _held(parameter: Any) -> bool:
    return getattr(parameter, "grad_sample", None) is not None


class GradSampleModule(GradSampleHooks, AbstractGradSampleModule):
    """Wraps a module, whose parameters have per-example gradients after each backward. See `GradSampleHooks`.

    Example:
        >>> import torch
        >>> model = GradSampleModule(nn.Linear(4, 2))
        >>> model(torch.randn(8, 4)).square().sum(1).mean().backward()
        >>> model._module.weight.grad_sample.shape
        torch.Size([8, 2, 4])
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
    ) -> None:
        AbstractGradSampleModule.__init__(self, m, batch_first=batch_first, loss_reduction=loss_reduction)
        self._watch(strict=strict, force_functorch=force_functorch)
