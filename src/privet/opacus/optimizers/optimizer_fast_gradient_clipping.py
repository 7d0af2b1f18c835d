"""The private optimizer of ghost clipping: the criterion's backward brings it a clipped sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from privet.errors import ProtocolError
from privet.gradients.clipped_sum import ClippedSum
from privet.opacus.optimizers.optimizer import DPOptimizer

__all__ = ["DPOptimizerFastGradientClipping"]


class DPOptimizerFastGradientClipping(DPOptimizer):
    """A `DPOptimizer` whose sums come from `DPLossFastGradientClipping`, and never from `p.grad` or `p.grad_sample`."""

    _waiting: tuple[ClippedSum, Sequence[int]] | None = None

    @property
    def accumulated_iterations(self) -> int:
        """Returns 1."""
        return 1

    def receive(self, clipped: ClippedSum, examples: int) -> None:
        """Takes the clipped sum of one backward, which waits for its step. For the criterion.

        Raises:
            ValueError: if that of another backward waits.
        """
        if self._waiting is not None:
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation: a second backward came before the step. "
                "Call optimizer.step() after every backward, or use BatchMemoryManager."
            )
        self._waiting = clipped, [examples]

    def accumulate(self) -> None:
        """Adds the sum of the last backward to that of the step at hand.

        Raises:
            ProtocolError: if there was no backward of the private criterion.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            raise ProtocolError(
                "there is no clipped sum: no loss of the private criterion had its backward. Expected "
                "criterion(outputs, targets).backward(), with the criterion that make_private returned, before step()."
            )
        self.add_to_sum(*waiting)

    def clip_and_accumulate(self) -> None:
        """Does nothing: the sum is clipped already."""

    def pre_step(self, closure: Callable[[], Any] | None = None) -> bool:
        """Does all that comes before the wrapped optimizer's step. Returns whether that step is to be taken."""
        self.accumulate()
        return self._after_clipping()

    def zero_grad(self, set_to_none: bool = False) -> None:  # noqa: FBT001, FBT002 - Opacus's signature
        """Forgets gradients, the sum of a backward that had no step, and the sum unless the last step was skipped."""
        self._waiting = None
        super().zero_grad(set_to_none)
