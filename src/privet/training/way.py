"""By which engine a batch becomes its sum: in one pass, in two, or compiled. An activation budget may change it."""

from __future__ import annotations

from collections.abc import Sequence

from privet.gradients.capture.capture import Capture
from privet.gradients.passes.compiled import CompiledSum
from privet.gradients.passes.one_pass import OnePass
from privet.gradients.passes.role import SumOfBatch
from privet.gradients.passes.two_pass import TwoPass
from privet.gradients.spread import Spread
from privet.training.collective import passes_of
from privet.training.loss_module import LossModule
from privet.training.performance import Performance

__all__ = ["Way"]


class Way:
    """Chooses the engine of a step.

    Args:
        performance: what was asked for.
        spread: the processes that hold the module together.
        loss: the model and its loss.
        capture: watches the model.
        groups: the clipping group of each parameter.
    """

    def __init__(
        self, performance: Performance, spread: Spread, loss: LossModule, capture: Capture, groups: Sequence[int]
    ) -> None:
        self._performance = performance
        self._spread = spread
        self._loss = loss
        self._capture = capture
        self.passes = passes_of(performance, spread, loss.model, groups)
        self.engine = self._chosen()

    def keep_to_budget(self, held: float, groups: Sequence[int]) -> None:
        """Takes two backwards from now on, on all ranks, if one would keep more than the activation budget on one.

        Args:
            held: the bytes that one backward is expected to keep.
            groups: the clipping groups of the parameters. Two backwards need one group.
        """
        budget = self._performance.activation_budget
        if budget is not None and self.passes != 2:
            over = self._spread.most(int(held > budget))
            if over and len(set(groups)) == 1:
                self.passes = 2
                self.engine = self._chosen()

    def _chosen(self) -> SumOfBatch:
        if self._performance.compile:
            return CompiledSum(self._capture, self._loss)
        way = TwoPass if self.passes == 2 else OnePass
        return way(self._capture, spread=self._spread)
