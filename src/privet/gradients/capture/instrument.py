"""A module under watch: hooks that begin and end a capture with each training forward, and the tripwires.

The module stays the user's own object, with the same class, attributes and `state_dict`. It carries two hooks, and each
trainable parameter one: a gradient that reaches a parameter came by a way that was not captured, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.count import count_examples
from privet.batches.cut import without_examples
from privet.batches.grow import one_of_zeros
from privet.batches.structure import Arguments
from privet.batches.tree import tensors_in
from privet.errors import UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import check_coverage
from privet.gradients.capture.custom_modules import watch_custom_modules
from privet.gradients.capture.hook import Hook, nothing, refuse_copy
from privet.gradients.capture.tripwire import Tripwires, refuse_thawed
from privet.gradients.use import Recorded

__all__ = ["Instrument"]


class Instrument:
    """Watches one module.

    Args:
        module: the user's module.
        parameters: its trainable parameters by canonical name.
        batch_first: whether the inputs have the batch on axis 0, else on axis 1.
        mapped: whether vmap takes the place of every rule.
        on_backward: gets what each backward recorded.
        on_check: called with the arguments of the first batch of at least two examples, after the coverage check.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_first: bool = True,
        mapped: bool = False,
        on_backward: Callable[[Recorded], None],
        on_check: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        self.capture = Capture(parameters, batch_first=batch_first, mapped=mapped, on_backward=on_backward)
        self._module = module
        self._axis = 0 if batch_first else 1
        self._on_check = on_check
        self._checked = 0  # the most examples that a check has seen, up to 2
        self._trainable: frozenset[str] = frozenset()
        self._suspended = False
        self._begun = False
        self._empty = False
        self._tripwires = Tripwires(parameters, self.capture.release)
        self._handles = [
            module.register_forward_pre_hook(Hook(self._before, refuse_copy), with_kwargs=True),
            module.register_forward_hook(Hook(self._after, nothing), always_call=True),
            *([] if mapped else watch_custom_modules(module, self.capture)),
        ]

    @property
    def examples(self) -> int | None:
        """Returns the number of examples of the forward that is being trained on, or None."""
        examples = self.capture.examples
        return 0 if self._empty and examples is not None else examples

    @property
    def empty(self) -> bool:
        """Returns whether the last training forward had no examples."""
        return self._empty

    def remove(self) -> None:
        """Makes the module an ordinary one again."""
        self.capture.release()
        self._tripwires.remove()
        for handle in self._handles:
            handle.remove()

    # -- the two hooks -----------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._suspended or not module.training or not torch.is_grad_enabled() or self.capture.watching:
            return None
        trainable = refuse_thawed(self._module, self.capture.parameters)
        if not trainable:  # gradients pass through to the inputs, as for a discriminator held fixed
            return None
        if trainable != self._trainable:  # what uses the others was not looked at
            self._trainable, self._checked = trainable, 0
        examples = count_examples(Arguments(args, kwargs), self._axis, name="the inputs")
        replaced = None
        self._empty = examples == 0
        if self._empty:
            examples = 1
            args, kwargs = replaced = one_of_zeros(Arguments(args, kwargs), axis=self._axis)
        if self._checked < min(examples, 2):  # an empty batch too needs to know the axis of its one zero example
            self._check(args, kwargs, examples)
        self.capture.begin(examples, made_up=self._empty)
        self._begun = True
        return replaced

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._begun:
            return None
        self._begun = False
        outputs = self._outputs(output)
        if output is None:
            self._fail(None)
        self.capture.end(outputs)
        if not self._empty:
            self._check_outputs(outputs, self.capture.examples)
            return None
        return without_examples(output, self._axis)

    def _fail(self, error: Exception | None) -> None:
        """Leaves nothing of a forward that broke off."""
        self.capture.release()
        if error is not None:
            raise error

    # -- what is asked of the model ----------------------------------------------------------------------------------

    def _outputs(self, output: Any) -> list[Tensor]:
        return [t for t in tensors_in(output) if t.requires_grad]

    def _check_outputs(self, outputs: list[Tensor], examples: int | None) -> None:
        for o in outputs:
            if o.dim() == 0:
                self._fail(UnsupportedModelError(
                    "the model returned a scalar that needs a gradient, such as a loss of its own: it hides how the "
                    "examples were put together, and so what one example can do. Expected outputs with one row for "
                    "each example. Compute the loss from them (do not pass labels to a model that then reduces a "
                    "loss), or use PrivateStep with a loss per example."
                ))  # fmt: skip
            elif o.dim() <= self._axis or o.shape[self._axis] != examples:
                self._fail(UnsupportedModelError(
                    f"the model returned a tensor of shape {tuple(o.shape)} for {examples} examples. Expected the "
                    f"batch on axis {self._axis}. Return one row for each example."
                ))  # fmt: skip

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any], examples: int) -> None:
        def run(inputs: Any) -> list[Tensor]:
            positional, keyword = inputs
            outputs = self._outputs(self._module(*positional, **keyword))
            self._check_outputs(outputs, count_examples(inputs, self._axis, name="the inputs"))
            return outputs

        self._suspended = True
        try:
            conclusive = check_coverage(
                self._module,
                self.capture,
                run,
                Arguments(args, kwargs),
                tripwires=self._tripwires,
                examples=examples,
                batch_axis=self._axis,
            )
            if self._on_check is not None and examples > 1:
                self._on_check(args, kwargs)
        finally:
            self._suspended = False
        self._checked = min(examples, 2) if conclusive else 0
