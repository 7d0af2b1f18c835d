"""Ends training before the step that would exceed the budget, and looks that a resumed run knows what was spent."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from privet.accounting.budget import Budget, BudgetMeter
from privet.accounting.event import Event
from privet.engine import PrivacyEngine
from privet.errors import BudgetExceededError, ConfigurationError
from privet.integrations.huggingface.installed import TrainerCallback

__all__ = ["EndsWithBudget"]

_LOG = logging.getLogger(__name__)


class EndsWithBudget(TrainerCallback):
    """A callback of the Trainer.

    Args:
        engine: returns the engine.
        event: returns the event of the next step.
    """

    def __init__(self, engine: Callable[[], PrivacyEngine], event: Callable[[], Event]) -> None:
        self._engine = engine
        self._event = event
        self._meter: tuple[Budget, BudgetMeter] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises if the checkpoint that a run goes on from did not bring the ledger of its steps."""
        steps = self._engine().ledger.steps
        if steps < state.global_step:
            raise ConfigurationError(
                f"the run goes on from step {state.global_step}, and the ledger has {steps} steps: ε would forget the "
                "others. Expected a checkpoint with the state of the private optimizer, which holds the ledger. Save "
                "checkpoints with save_only_model=False, by PrivateTrainer."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops training if the next step would exceed the budget."""
        ledger = self._engine().ledger
        budget = ledger.budget
        if budget is None or state.global_step >= state.max_steps:
            return
        if self._meter is None or self._meter[0] is not budget:
            self._meter = budget, BudgetMeter(budget, ledger.accountant, ledger.relation)
        begun: Counter[Event] = Counter()
        for phase in ledger.phases:
            begun[phase.event] += phase.count
        try:
            self._meter[1].admit(self._event(), 1, begun)
        except BudgetExceededError as error:
            _LOG.warning("privet: training ends after step %d. %s", state.global_step, error)
            control.should_training_stop = True
