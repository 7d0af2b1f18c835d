"""How much noise there is to be, and every option of `make_private`, as an integration takes them from its user.

An integration hands them on when its framework has made the model, the optimizer and the loader.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from privet._checks import check_at_least, check_count, check_positive, check_target_delta
from privet.engine import PrivacyEngine
from privet.errors import ConfigurationError
from privet.sampling import PrivateLoader, privatize_loader
from privet.training.accumulate import Accumulate

__all__ = ["PrivateArguments", "loader_of_all"]

_OF_THE_FRAMEWORK = {"self", "module", "optimizer", "data_loader", "noise_multiplier", "criterion"}
_DELTA = 1e-5


@final
class PrivateArguments:
    """The arguments of `make_private`, or of `make_private_with_epsilon`, that a user gave to an integration.

    Args:
        noise_multiplier: the noise, or None where a target is given.
        target_epsilon: the target, or None where the noise is given.
        target_delta: δ of the target; beside a noise multiplier, the δ that ε is shown for.
        epochs: how many passes the target is for; by default what the framework says.
        options: all others, by the names that `make_private` has for them.

    Raises:
        TypeError: for an option that `make_private` does not have.
        ConfigurationError: for numbers that are out of range, or that do not fit together.
    """

    def __init__(
        self,
        *,
        noise_multiplier: float | None,
        target_epsilon: float | None,
        target_delta: float | None,
        epochs: int | None,
        options: Mapping[str, Any],
    ) -> None:
        known = set(inspect.signature(PrivacyEngine.make_private).parameters) - _OF_THE_FRAMEWORK
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unknown options: {', '.join(unknown)}. Expected some of {', '.join(sorted(known))}.")
        if (noise_multiplier is None) == (target_epsilon is None):
            raise ConfigurationError(
                f"got noise_multiplier={noise_multiplier} and target_epsilon={target_epsilon}. Expected one of the "
                "two: the noise, or what it may cost with target_delta=. Leave the other away."
            )
        if noise_multiplier is not None:
            check_at_least("noise_multiplier", noise_multiplier)
            if epochs is not None:
                raise ConfigurationError(
                    "epochs= says what a target is for, and noise_multiplier= was given. Leave epochs= away: the "
                    "framework says how long it trains."
                )
        else:
            check_positive("target_epsilon", target_epsilon)
            if target_delta is None:
                raise ConfigurationError("target_epsilon= needs target_delta=, such as 1 / (10 * len(dataset)).")
            if epochs is not None:
                check_count("epochs", epochs, 1)
        if target_delta is not None:
            check_target_delta("target_delta", target_delta)
        self.noise_multiplier = noise_multiplier
        self.target_epsilon = target_epsilon
        self.epochs = epochs
        self.options = dict(options)
        self._delta = target_delta

    def delta(self, engine: PrivacyEngine) -> float:
        """Returns the δ that ε is shown for: what was given, else that of the budget, else 1e-5."""
        if self._delta is not None:
            return self._delta
        return _DELTA if engine.budget is None else engine.budget.delta

    def accumulated(self, by_the_framework: int) -> int:
        """Returns how many batches make a step: as an option says, or else as the framework does."""
        own = self.options.get("accumulate", by_the_framework)
        return own.batches if isinstance(own, Accumulate) else check_count("accumulate", own, 1)

    def make_private(
        self,
        engine: PrivacyEngine,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        epochs: int | None,
        accumulate: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> PrivateLoader:
        """Makes the module and the optimizer private, in place, and returns the private loader.

        Args:
            engine: counts what it costs.
            module: is trained.
            optimizer: trains it.
            data_loader: of the user.
            epochs: the passes that the framework is about to take, if it says so.
            accumulate: how many batches make one step.
            grad_scaler: what the framework scales losses with, if it does.

        Raises:
            ConfigurationError, ProtocolError, UnsupportedModelError: as `make_private` says.
        """
        options = {**self.options, "module": module, "optimizer": optimizer, "data_loader": data_loader}
        if accumulate > 1:
            options["accumulate"] = accumulate
        if grad_scaler is not None:
            options["grad_scaler"] = grad_scaler
        if self.noise_multiplier is not None:
            made: tuple[Any, Any, PrivateLoader] = engine.make_private(
                **options, noise_multiplier=self.noise_multiplier
            )
            return made[2]
        passes = epochs if self.epochs is None else self.epochs
        if passes is None:
            raise ConfigurationError(
                "target_epsilon= is for a number of passes over the data, and nothing says how many there are. Give "
                "epochs=."
            )
        target: dict[str, Any] = {"target_epsilon": self.target_epsilon, "target_delta": self._delta}
        made = engine.make_private_with_epsilon(**options, **target, epochs=passes)
        return made[2]


def loader_of_all(loader: DataLoader[Any], *, ranks: int, poisson: bool) -> DataLoader[Any]:
    """Returns a loader whose batches are those of all ranks together, of one that says the batch size of each.

    Raises:
        ConfigurationError: for a loader whose batches have no known law.
    """
    if ranks == 1:
        return loader
    privatize_loader(loader, poisson=poisson)  # refuses what could not be rebuilt
    size = check_count("batch_size", loader.batch_size, least=1)
    return DataLoader(
        loader.dataset,
        batch_size=size * ranks,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
