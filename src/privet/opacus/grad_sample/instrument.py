"""The core's instrument, for two habits of scripts that were written for Opacus."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from privet.batches.count import count_examples
from privet.batches.structure import Arguments
from privet.gradients.capture.instrument import Instrument

__all__ = ["ForgivingInstrument"]


class ForgivingInstrument(Instrument):
    """An `Instrument` that takes two more things.

    * A forward in train mode that had no backward is given up when one of another batch comes. A backward through it
      raises afterwards: nothing of it ever reaches a parameter.
    * With the batch on axis 1 of the inputs, it may be on axis 0 of the outputs. Which one it is, the checks tell, that
      run the model on batches of several sizes.
    """

    def __init__(self, module: nn.Module, parameters: Any, *, batch_first: bool = True, **options: Any) -> None:
        self._input_axis = 0 if batch_first else 1
        self._output_axes = {0, self._input_axis}
        super().__init__(module, parameters, batch_first=batch_first, **options)

    @property
    def output_axis(self) -> int:
        """Returns the axis of the outputs that the examples are on."""
        return max(self._output_axes)

    def _begin(self, inputs: Arguments, members: int, examples: int) -> None:
        cycle = self.capture.cycle
        if cycle is not None and not cycle.queued and cycle.members != members:
            self.capture.release()
        super()._begin(inputs, members, examples)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._axis = self.output_axis
        try:
            return super()._after(module, args, output)
        finally:
            self._axis = self._input_axis

    def _checked_outputs(self, inputs: Arguments) -> list[Tensor]:
        outputs = self._outputs(self._module(*inputs.args, **inputs.kwargs))
        examples = count_examples(inputs, self._input_axis, name="the inputs")
        axes = {axis for axis in self._output_axes if all(o.shape[axis : axis + 1] == (examples,) for o in outputs)}
        self._output_axes = axes or self._output_axes
        self._axis = self.output_axis
        try:
            self._check_outputs(outputs, examples)
        finally:
            self._axis = self._input_axis
        # The checks look for the examples where the inputs have them.
        moved = self.output_axis != self._input_axis
        return [o.transpose(0, 1) if moved and o.dim() > 1 else o for o in outputs]
