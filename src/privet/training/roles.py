"""What an update asks of others: of schedules of its mechanism, and of what forms sums late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from privet.errors import ConfigurationError
from privet.gradients.clipped_sum import ClippedSum

__all__ = ["LateSum", "Scheduled", "refuse_other_schedules"]


class Scheduled(Protocol):
    """A schedule of the mechanism, as a checkpoint sees it."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the schedule is."""

    def refuse_state(self, state: Mapping[str, Any]) -> None:
        """Raises if the state is of another schedule."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there."""


class LateSum(Protocol):
    """Forms the sum of a backward when a step needs it, and not before: the modes that show per-example gradients."""

    @property
    def pending(self) -> bool:
        """Returns whether there is something to form a sum of."""

    def bring(self) -> None:
        """Hands the sum to the update's `receive`, if there is something to form it of."""

    def summed(self, clipped: ClippedSum) -> None:
        """Looks at the sum of a whole logical batch before noise is added."""


def refuse_other_schedules(schedules: Sequence[Scheduled], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises if states were saved by other schedules than these."""
    if len(saved) != len(schedules):
        raise ConfigurationError(
            f"the checkpoint has {len(saved)} schedules, and this run {len(schedules)}. Expected the same ones. Build "
            "the schedules of the saved run, in the same order, before loading."
        )
    for schedule, its_state in zip(schedules, saved, strict=True):
        schedule.refuse_state(its_state)
