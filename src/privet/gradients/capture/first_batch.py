"""The check of the model on a batch as one object: when it is due, and what it does.

One check is not enough: a gate that was closed opens, a branch is taken late. So it is repeated after a public schedule
that counts forwards (`schedule.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from privet.batches.flat import rearranged_bags
from privet.batches.grow import detached
from privet.batches.kept import opened, with_squares_kept
from privet.errors import CoverageError, UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import FlatError, GrowthError, check_coverage
from privet.gradients.capture.schedule import Schedule
from privet.gradients.capture.tripwire import Tripwires
from privet.gradients.spread import HERE, Spread

__all__ = ["FirstBatch"]

_ENOUGH = 2
"""How many examples a check needs to be final: whether examples meet in the backward does not show with one."""


class FirstBatch:
    """Checks the first batch of a run, and again on a schedule and whenever the last check does not hold any more.

        first.trains(names)                           # before every batch, which is counted
        wanted = first.wanted(inputs, examples)       # this batch, that of another rank, or None
        if wanted is not None:
            first.run(*wanted)                        # raises, or the batch may be trained on

    Args:
        module: the model whose buffers and random numbers are put back.
        capture: learns where the examples are.
        tripwires: are kept quiet during the check.
        outputs: runs the model on some inputs, and returns its differentiable outputs.
        batch_axis: the axis that the examples are on.
        also: a second check, run with the inputs after the first, on a batch of at least two examples.
        spread: the processes that hold the model together, which all check one batch.
    """

    def __init__(
        self,
        module: nn.Module,
        capture: Capture,
        tripwires: Tripwires,
        outputs: Callable[[Any], Sequence[Tensor]],
        *,
        batch_axis: int = 0,
        also: Callable[[Any], None] | None = None,
        spread: Spread = HERE,
    ) -> None:
        self._module = module
        self._capture = capture
        self._tripwires = tripwires
        self._outputs = outputs
        self._axis = batch_axis
        self._also = also
        self._spread = spread
        self._seen = 0  # the most examples that a conclusive check has seen, up to `_ENOUGH`
        self._trainable: frozenset[str] = frozenset()
        self._schedule = Schedule()
        self._repeats = False  # whether all that trains was checked before
        self.held = 0
        """The most bytes that the backward of one example was seen to keep until the norms are known."""

    def _holds(self, held: int) -> None:
        self.held = max(self.held, held)

    def trains(self, trainable: frozenset[str]) -> None:
        """Counts one more forward; makes the check due again on schedule, or if other parameters train than before."""
        if self._schedule.counts():
            self._seen = 0
        if trainable != self._trainable:  # their uses were not looked at
            self._seen = 0
            self._repeats = False
            self._trainable = trainable

    def due(self, examples: int, *, pending: bool = False) -> bool:
        """Returns whether a batch of so many examples has to be checked before it is trained on.

        A check drops forwards that are `pending`, whose backward is still to come. So a repeated one waits for the
        first forward after that backward.
        """
        return self._seen < min(examples, _ENOUGH) and not (pending and self._repeats)

    def wanted(self, inputs: Any, examples: int, *, pending: bool = False) -> tuple[Any, int] | None:
        """Returns what has to be checked before a batch is trained on, and its number of examples, or None."""
        if self._seen >= _ENOUGH:  # on every rank alike: all have checked the same batches
            return None
        return self._spread.looked_at(inputs, examples, due=self.due(examples, pending=pending))

    def run(self, inputs: Any, examples: int, *, whole: bool = False) -> None:
        """Checks one batch, and remembers if the check was conclusive. Nothing is released.

        Args:
            inputs: the batch.
            examples: how many examples it has.
            whole: whether every example is looked at, since it is not certain which rows of this very batch are whose.

        Raises:
            UnsupportedModelError, CoverageError: see `check_coverage`; and whatever the second check raises.
        """
        self._seen = 0
        known = self._capture.knowledge()
        try:
            conclusive = self._checked_as_it_grows(inputs, examples, whole=whole)
        except BaseException:
            self._capture.forget_since(known)  # else what a refused batch taught would hold for the next
            raise
        if conclusive:
            self._seen = min(examples, _ENOUGH)
            self._repeats = self._seen == _ENOUGH

    def _checked_as_it_grows(self, inputs: Any, examples: int, *, whole: bool) -> bool:
        """Checks a batch, with what does not grow by a row for an example hidden, or rearranged."""
        try:
            return self._checked(inputs, examples, whole=whole)
        except FlatError as flat:
            by_example = rearranged_bags(detached(inputs), flat.given, flat.bags, examples=examples)
            if by_example is None:
                raise
            return self._checked_as_it_grows(by_example, examples, whole=whole)
        except GrowthError:
            kept = with_squares_kept(inputs, examples=examples, axis=self._axis)
            if kept is inputs:
                raise
            return self._checked(kept, examples, whole=whole)

    def _checked(self, inputs: Any, examples: int, *, whole: bool) -> bool:
        also = self._also if self._also is not None and examples > 1 else None
        try:
            conclusive = check_coverage(
                self._module,
                self._capture,
                lambda inputs: self._outputs(opened(inputs)),
                inputs,
                tripwires=self._tripwires,
                examples=examples,
                batch_axis=self._axis,
                whole=whole,
                spread=self._spread,
                on_held=self._holds,
            )
        except CoverageError:
            if also is not None:
                also(inputs)  # it says more of a model that mixes examples
            raise
        if whole and not conclusive:
            raise UnsupportedModelError(
                "it is not certain which rows of this batch belong to which example, and the check that would tell "
                "met gradients that are not finite. Expected finite gradients on such a batch. Look for an example "
                "that is NaN, or say whose the rows are (privet.rows_of)."
            )
        if also is not None:
            also(inputs)
        return conclusive
