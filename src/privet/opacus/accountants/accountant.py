"""The role of an accountant as Opacus describes it: a history of steps, and ε of all of it.

The history is a list of `(noise_multiplier, sample_rate, steps)`. A rate of 1 is a release that nothing amplifies, and
a noise multiplier of 0 one without privacy.
"""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from copy import deepcopy
from typing import Any

from privet.accounting import Accountant, ComposedEvent, Event, GaussianEvent, PoissonEvent, repeated
from privet.accounting.event import Relation
from privet.opacus.warning import warn

__all__ = ["History", "IAccountant", "StepAccountant", "event_of", "joined"]

History = list[tuple[float, float, int]]


class IAccountant(abc.ABC):
    """Counts the steps of a training and says what they cost. Subclass it for an accountant of your own."""

    @abc.abstractmethod
    def __init__(self) -> None:
        self.history: History = []

    @abc.abstractmethod
    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Adds one step to the history."""

    @abc.abstractmethod
    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Returns ε at `delta` of the whole history."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of steps in the history."""

    @classmethod
    @abc.abstractmethod
    def mechanism(cls) -> str:
        """Returns the name of the way of accounting."""

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """Returns a hook for `DPOptimizer.attach_step_hook` that counts each step at this rate.

        An optimizer that `PrivacyEngine.make_private` returns counts its steps itself, and needs no such hook.
        """

        def count(optimizer: Any) -> None:
            self.step(
                noise_multiplier=optimizer.noise_multiplier,
                sample_rate=min(1.0, sample_rate * optimizer.accumulated_iterations),
            )

        return count

    def state_dict(self, destination: MutableMapping[str, Any] | None = None) -> MutableMapping[str, Any]:
        """Returns the history and the name of the mechanism, in `destination` if one is given."""
        state: MutableMapping[str, Any] = OrderedDict() if destination is None else destination
        state["history"] = deepcopy(self.history)
        state["mechanism"] = self.mechanism()
        return state

    def load_state_dict(self, state_dict: MutableMapping[str, Any]) -> None:
        """Takes a saved history. Steps that were counted here already stay counted.

        Raises:
            ValueError: for a state that is empty, lacks a key, or is of another mechanism.
        """
        if not state_dict:
            raise ValueError("the state of an accountant is empty or None. Expected what its state_dict() returned.")
        missing = [key for key in ("history", "mechanism") if key not in state_dict]
        if missing:
            raise ValueError(f"the state of an accountant lacks {', '.join(missing)}. Expected both of its keys.")
        if state_dict["mechanism"] != self.mechanism():
            raise ValueError(
                f"the state was saved by the accountant {state_dict['mechanism']!r}, and this one is "
                f"{self.mechanism()!r}. Make an accountant of the saved kind."
            )
        self.history = joined(self.history, [tuple(entry) for entry in state_dict["history"]])


def joined(here: History, saved: History) -> History:
    """Returns the history of a run that loads another: the longer one where one begins the other, else both."""
    steps = sum(count for _, _, count in here), sum(count for _, _, count in saved)
    longer, shorter = (here, saved) if steps[0] > steps[1] else (saved, here)
    if _begins(shorter, longer):
        return list(longer)
    warn(
        "steps were counted here that the loaded history does not have. Opacus forgets them; they were taken on the "
        "data all the same, so that both are counted. Load into a new engine to go on from the saved history alone."
    )
    return [*saved, *here]


def _begins(shorter: History, longer: History) -> bool:
    """Returns whether one history is the beginning of another; the last entry may have grown."""
    if not shorter:
        return True
    *whole, last = shorter
    grown = longer[len(whole)] if len(longer) >= len(shorter) else None
    return list(longer[: len(whole)]) == whole and grown is not None and grown[:2] == last[:2] and grown[2] >= last[2]


def event_of(history: History) -> Event:
    """Returns the whole history as one event of the core's accounting."""
    events = []
    for noise_multiplier, sample_rate, steps in history:
        event: Event = GaussianEvent(noise_multiplier)
        events.append(repeated(event if sample_rate >= 1.0 else PoissonEvent(sample_rate, event), int(steps)))
    return ComposedEvent(tuple(events))


class StepAccountant(IAccountant):
    """Counts equal steps in one entry, and asks one accountant of the core for ε."""

    def __init__(self) -> None:
        self.history: History = []

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Adds one step to the history."""
        entry = (noise_multiplier, sample_rate)
        if self.history and self.history[-1][:2] == entry:
            self.history[-1] = (*entry, self.history[-1][2] + 1)
        else:
            self.history.append((*entry, 1))

    def __len__(self) -> int:
        """Returns the number of steps."""
        return sum(steps for _, _, steps in self.history)

    def _epsilon(self, accountant: Accountant, delta: float) -> float:
        if not self.history:
            return 0.0
        return accountant.epsilon(event_of(self.history), delta, relation=Relation.ADD_OR_REMOVE_ONE)
