"""A forward run anew: when it was not certain whose the rows were, its batch is looked at, and it runs once more.

What the batch taught is told to the new forward. So both have to do the same: they run with the same random numbers,
which are torch's as the dropped forward found them, and Python's and NumPy's as it left them.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from privet.batches.out_of_memory import is_out_of_memory
from privet.errors import PrivetError, UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.layout import DoubtError
from privet.gradients.spread import HERE, Spread

__all__ = ["Anew", "agree_on_doubt"]

_ATTEMPTS = 3
_Output = TypeVar("_Output")


class _DoubtElsewhereError(DoubtError):
    """Another process is in doubt, whose forward this one has to go along with."""

    def __init__(self) -> None:
        super().__init__("another rank met rows that could be of several", "See the error of that rank.")


def agree_on_doubt(capture: Capture, spread: Spread) -> None:
    """Puts the forward that has run in doubt if it is in doubt on another process, which it needs to run anew."""
    cycle = capture.cycle
    if cycle is None or not spread.collective:
        return
    if spread.most(int(cycle.doubt is not None)) and cycle.doubt is None:
        cycle.doubt = _DoubtElsewhereError()


class Anew:
    """Looks at batches in doubt, and runs their forwards once more.

    Args:
        capture: is told what was learned of a batch.
        look_at: checks a batch of so many examples, all of them, and tells the capture; raises if the check fails.
        spread: the processes that hold the model together. Where a forward needs all of them, all look at the batch of
            each that is in doubt, and all run their forward anew.
    """

    def __init__(self, capture: Capture, look_at: Callable[[Any, int], None], *, spread: Spread = HERE) -> None:
        self._capture = capture
        self._spread = spread
        self._look_at = look_at
        self._said: set[str] = set()
        self._begun: Tensor | None = None

    def begins(self) -> None:
        """Remembers torch's random numbers, before a forward that may have to run anew."""
        self._begun = torch.get_rng_state()

    def run(self, inputs: Any, examples: int, doubt: DoubtError, forward: Callable[[], _Output]) -> _Output:
        """Checks a batch, and returns what `forward` returns, which is run without a doubt.

        Args:
            inputs: the batch.
            examples: how many examples it has.
            doubt: of the forward before.
            forward: begins a forward of the same inputs, and runs it. If it is in doubt at its end, it raises
                `DoubtError`, or leaves that to the end of its cycle.

        Raises:
            DoubtError: if the doubt remains, although the batch was looked at.
            UnsupportedModelError, CoverageError: if the check fails.
        """
        self._say(doubt)
        if self._begun is not None:
            torch.set_rng_state(self._begun)
        try:
            for _ in range(_ATTEMPTS):
                before = _random_numbers()
                self._look(inputs, examples, doubt)
                _put_back(before)
                try:
                    output = forward()
                    agree_on_doubt(self._capture, self._spread)
                    cycle = self._capture.cycle
                    if cycle is None or cycle.doubt is None:
                        return output
                    doubt = cycle.doubt
                    self._capture.set_aside()
                except DoubtError as remaining:
                    doubt = remaining
            raise doubt
        finally:
            self._capture.tell(None)

    def _look(self, inputs: Any, examples: int, doubt: DoubtError) -> None:
        """Looks at each batch in doubt, and tells the capture what was learned of the own one."""
        told = None
        due = not isinstance(doubt, _DoubtElsewhereError)
        for some, count, own in self._spread.in_turn(inputs, examples, due=due):
            self._checked(some, count, doubt)
            told = self._capture.told if own else told
        self._capture.tell(told)

    def _checked(self, inputs: Any, examples: int, doubt: DoubtError) -> None:
        """Looks at the batch, and says why it was looked at where that fails."""
        try:
            self._look_at(inputs, examples)
        except PrivetError as error:
            error.add_note(f"This batch was looked at because of a doubt: {doubt}")
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # The model has just run on this batch: what is wrong is how its rows were taken to lie.
            raise UnsupportedModelError(
                f"{doubt} (This batch was looked at, which ended with {type(error).__name__}: {error})"
            ) from error

    def _say(self, doubt: DoubtError) -> None:
        """Warns, once for each place, that batches are looked at again and again."""
        if doubt.place is None or doubt.place in self._said:
            return
        self._said.add(doubt.place)
        warnings.warn(
            f"rows were moved along the batch at {doubt.place}, and then met a parameter. Which example they belong to "
            "cannot be told by their place, so every batch in which this happens is checked, which takes several "
            "times as long. Say whose the rows are with privet.rows_of to train at full speed.",
            stacklevel=2,
        )


def _random_numbers() -> tuple[Any, ...]:
    """Returns the states of the generators that a model may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), cuda  # noqa: NPY002 - users' own


def _put_back(state: tuple[Any, ...]) -> None:
    cpu, python, numpy, cuda = state
    torch.set_rng_state(cpu)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    for device, each in enumerate(cuda):
        torch.cuda.set_rng_state(each, device)
