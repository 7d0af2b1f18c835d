"""Looks at losses as the core does, and takes a sum for what it is where a mean was declared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from privet.errors import ConfigurationError
from privet.gradients.capture.loss_watch import LossWatch
from privet.opacus.warning import warn

__all__ = ["DeclaredLoss"]


class DeclaredLoss(LossWatch):
    """A `LossWatch` that finds out by itself that losses are sums, and says so once, instead of refusing them.

    Opacus multiplies the gradients of what it takes for a mean by the number of examples drawn, before they are
    clipped. Of a sum, each example's gradient would then depend on how many others were drawn.
    """

    @property
    def mean(self) -> bool:
        """Returns whether losses are means over the examples."""
        return self._mean

    def follow(self, outputs: Sequence[Tensor], examples: int, on_fault: Callable[[], None], **options: Any) -> None:
        """Looks at the loss when the gradient comes; the examples may be on axis 0 of outputs where inputs differ."""
        if self._axis and all(o.shape[self._axis : self._axis + 1] != (examples,) for o in outputs):
            self._axis = 0
        super().follow(outputs, examples, on_fault, **options)

    def _look(self, examples: int) -> None:
        due, outputs, trusted, backwards = self._due, [*self._outputs], [*self._trusted], self._backwards
        try:
            super()._look(examples)
        except ConfigurationError:
            if not self._mean:
                raise
            self._mean = False
            self._due, self._outputs, self._trusted, self._backwards = due, outputs, trusted, backwards
            try:
                super()._look(examples)
            except ConfigurationError:
                self._mean = True
                self._due, self._outputs, self._trusted, self._backwards = due, outputs, trusted, backwards
                super()._look(examples)  # raises what is wrong with the loss as it was declared
                raise
            warn(
                "the loss is a sum over the examples, and loss_reduction is 'mean'. Opacus multiplies every gradient "
                "by the number of examples that were drawn, so that one example rescales the others. Here gradients "
                "are those of each example's own loss. Give loss_reduction='sum', or take the mean."
            )
