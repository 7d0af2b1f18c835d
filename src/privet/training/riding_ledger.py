"""The ledger rides in the optimizer's own state, which every framework saves: a resumed run knows what was spent.

    optimizer.state_dict()         has one more key, `privet`: the ledger, and how many steps this run took
    optimizer.load_state_dict(s)   adds the steps of `s` that this ledger lacks, before anything is loaded

Runs are joined by their ids, so nothing is counted twice where a checkpoint holds the ledger in two places. What has no
such key (a state of an ordinary optimizer, weights alone) is loaded, and epsilon does not know of it: that is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from privet._checks import check_count
from privet.accounting.role import LedgerLike
from privet.errors import LedgerError
from privet.gradients.capture.hook import Hook, nothing

__all__ = ["KEY", "CarriedLedger", "LedgerHook", "RidingLedger", "Run"]

KEY = "privet"
_FORMAT = 1


class Run(Protocol):
    """What rides: a ledger, and the number of steps that this run has taken."""

    steps: int

    @property
    def ledger(self) -> LedgerLike:
        """Returns the ledger."""

    def settle(self) -> None:
        """Puts on the ledger what happened without privacy, if anything did."""


class LedgerHook(Hook):
    """A hook on a private module whose copies, and pickles, carry what the ledger held when they were made.

    Args:
        function: what the hook does.
        ledger_now: returns the ledger as plain values.
    """

    def __init__(self, function: Callable[..., Any], ledger_now: Callable[[], dict[str, object]]) -> None:
        super().__init__(function, nothing)
        self._ledger_now = ledger_now

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return CarriedLedger(self._ledger_now())

    def __reduce__(self) -> Any:
        return (CarriedLedger, (self._ledger_now(),))


class CarriedLedger(Hook):
    """What a copy of a private module carries: the ledger as it was then. It does nothing else.

    Args:
        state: the ledger as plain values.
    """

    def __init__(self, state: dict[str, object]) -> None:
        super().__init__(nothing, nothing)
        self.state = state

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return CarriedLedger(self.state)

    def __reduce__(self) -> Any:
        return (CarriedLedger, (self.state,))


class RidingLedger:
    """Puts a run's ledger into its optimizer's state, and takes back what a loaded state holds.

    Args:
        run: whose ledger it is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._unknown: set[str] = set()  # what was loaded that epsilon knows nothing of
        self._handles: list[RemovableHandle] = []

    def attach(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Follows from now on what is saved of an optimizer, and what is loaded into it and into its module."""
        self._handles = [
            optimizer.register_state_dict_post_hook(self._saved),
            optimizer.register_load_state_dict_pre_hook(self._loading),
            module.register_load_state_dict_post_hook(LedgerHook(self._weights_loaded, self._ledger_now)),  # type: ignore[no-untyped-call]
        ]

    def detach(self) -> None:
        """Follows neither any more. What is saved of the optimizer from now on holds no ledger."""
        for handle in self._handles:
            handle.remove()

    def _ledger_now(self) -> dict[str, object]:
        self._run.settle()
        return dict(self._run.ledger.state_dict())

    def say_what_is_unknown(self) -> None:
        """Warns, before the first step, of what was loaded that no step on the ledger explains. Warns once."""
        unknown, self._unknown = self._unknown, set()
        if unknown and not self._run.ledger.steps:
            warnings.warn(
                f"{' and '.join(sorted(unknown))} were loaded after training became private, and the ledger is empty: "
                "if they were trained on these data, epsilon does not know what that has cost. Load the state of the "
                "private optimizer too, which holds the ledger, or that of the engine or the step. If they were "
                "trained on other data, load them before training becomes private, and nothing is said.",
                stacklevel=2,
            )

    # -- the hooks ---------------------------------------------------------------------------------------------------

    def _saved(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Adds the ledger to a saved state. An optimizer's state_dict post-hook."""
        self._run.settle()
        ledger = dict(self._run.ledger.state_dict())
        return {**state, KEY: {"format": _FORMAT, "ledger": ledger, "steps": self._run.steps}}

    def _loading(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Adds to the ledger what a state holds beyond it. An optimizer's load_state_dict pre-hook.

        Raises:
            LedgerError: if what rides in the state is damaged, or of another relation or unit. Nothing is loaded then.
        """
        if KEY not in state:
            if state.get("state"):
                self._unknown.add("a state of an optimizer that holds no ledger")
            return dict(state)
        riding = state[KEY]
        if not isinstance(riding, Mapping) or riding.get("format") != _FORMAT or "ledger" not in riding:
            raise LedgerError(
                f"the state of the optimizer has under {KEY!r} no ledger of format {_FORMAT}, got {riding!r}. Expected "
                "it as state_dict() returned it. Nothing was loaded. Save the state again with the version of "
                "privet that wrote it."
            )
        steps = check_count("steps", riding.get("steps"))
        self._run.ledger.load_state_dict(riding["ledger"])  # it may refuse, and nothing is changed then
        self._run.steps = max(self._run.steps, steps)
        self._unknown.clear()
        return {key: value for key, value in state.items() if key != KEY}

    def _weights_loaded(self, *rest: Any) -> None:
        """Takes note that weights were loaded that no step explains. A module's load_state_dict post-hook."""
        if not self._run.ledger.steps:
            self._unknown.add("weights")
