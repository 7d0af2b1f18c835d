"""Accumulation as a user declares it: how many batches make a step, and what their losses are divided by."""

from __future__ import annotations

from dataclasses import dataclass

from privet._checks import check_count
from privet.errors import ConfigurationError

__all__ = ["Accumulate", "accumulate_for"]


@dataclass(frozen=True)
class Accumulate:
    """One logical batch in `batches` backwards, and then one step.

    Attributes:
        batches: how many batches of the loader make a logical batch.
        divided: whether the loop divides each mean loss by `batches`, as in `(loss / k).backward()`. The step is the
            same either way: that of the mean over one large batch.

    Example:
        >>> Accumulate(4, divided=False).loss_divisor
        1
    """

    batches: int
    divided: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batches", check_count("accumulate", self.batches, 1))
        given: object = self.divided
        if not isinstance(given, bool):
            raise ConfigurationError(f"divided of Accumulate must be True or False, got {given!r}.")

    @property
    def loss_divisor(self) -> int:
        """Returns what the loop divides a mean loss by."""
        return self.batches if self.divided else 1


def accumulate_for(given: int | Accumulate, *, mode: str) -> Accumulate:
    """Returns the accumulation that an argument names.

    Raises:
        ConfigurationError: if it is out of range, or the mode forms no sum before the step.
    """
    found = given if isinstance(given, Accumulate) else Accumulate(given)
    if found.batches > 1 and mode != "auto":
        raise ConfigurationError(
            f"accumulate={found.batches} and grad_sample_mode={mode!r} were both given: that mode clips what "
            "p.grad_sample holds at the step, which is of the last batch alone. Expected grad_sample_mode='auto' with "
            "accumulate. Or leave accumulate away and use BatchMemoryManager, with a step after each physical batch."
        )
    return found
