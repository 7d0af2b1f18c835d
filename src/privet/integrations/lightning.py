"""Private training in Lightning 2: one callback.

    private = PrivateTraining(noise_multiplier=1.1, max_grad_norm=1.0)
    trainer = Trainer(max_epochs=5, callbacks=[private])
    trainer.fit(model, train_dataloaders=loader)
    private.get_epsilon(delta=1e-5)

The callback makes the module, its optimizer and its training loader private when `fit` begins, after Lightning has
configured them, and before a checkpoint's training state is restored. The ledger rides in the optimizer's state, which
Lightning saves and restores; where the loader is, it saves with this callback and, in mid-epoch, with its loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import nn

from privet.engine import PrivacyEngine
from privet.errors import BudgetExceededError, ConfigurationError, CoverageError, ProtocolError
from privet.integrations.arguments import PrivateArguments, loader_of_all
from privet.integrations.needed import need
from privet.sampling import PrivateLoader

need("lightning", "2.2", extra="lightning")

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402 - after the line that says what to install
from lightning.pytorch.utilities import rank_zero_info  # noqa: E402
from lightning.pytorch.utilities.model_helpers import is_overridden  # noqa: E402

from privet.integrations.lightning_trainer import (  # noqa: E402
    feed,
    grad_scaler,
    planned_epochs,
    refuse_cut_step,
    refuse_trainer,
    training_loader,
    unwrap,
)

__all__ = ["PrivateTraining"]


@final
class PrivateTraining(Callback):
    """Makes `Trainer.fit` train with differential privacy, logs ε, and stops when the budget is spent.

    Args:
        noise_multiplier: the noise's standard deviation over the sensitivity.
        target_epsilon: in its place: what training may cost. The noise is the least whose epochs cost at most that,
            and the target becomes the budget.
        target_delta: δ of the target. Beside a noise multiplier: the δ that ε is logged for, by default 1e-5.
        epochs: the passes that the target is for; by default `max_epochs` of the Trainer.
        engine: counts what it costs: give one for a budget of your own, another accountant, or a ledger that several
            runs share. By default a new one.
        module: the name of the part of the LightningModule that is trained and called in `training_step`. By default
            the LightningModule itself where it has a `forward`, else its one child that has trainable parameters.
        log_clip_fraction: whether to log what fraction of each step's gradients was made shorter, as
            "clip_fraction (not private)". It has no noise and ε does not cover it: the ledger is marked. Leave it off
            where a logger sends what it gets to other people.
        options: all other options of `PrivacyEngine.make_private`, such as `max_grad_norm`.

    The loader's `batch_size` is that of one process, as ever in Lightning; under Poisson sampling it is the expected
    one. A step is of `batch_size` times the number of processes times `accumulate_grad_batches` examples on average.

    Where the next step would exceed the budget, it is not taken, and `fit` ends as by `trainer.should_stop`: hooks run,
    checkpoints are written, the weights stay. `stopped_by_budget` says so afterwards.

    Raises:
        TypeError: for an option that `make_private` does not have.
        ConfigurationError: for numbers that are out of range; and from `fit`, before anything is trained, for a setting
            of the Trainer that private training does not go with.

    Example:
        >>> from privet.integrations.lightning import PrivateTraining
        >>> private = PrivateTraining(noise_multiplier=1.1, max_grad_norm=1.0)
        >>> private.get_epsilon(delta=1e-5)  # nothing was trained yet
        0.0
    """

    def __init__(
        self,
        *,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        epochs: int | None = None,
        engine: PrivacyEngine | None = None,
        module: str | None = None,
        log_clip_fraction: bool = False,
        **options: Any,
    ) -> None:
        self.engine = PrivacyEngine() if engine is None else engine
        self.stopped_by_budget = False
        self._module = module
        self._log_clip_fraction = log_clip_fraction
        self._arguments = PrivateArguments(
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            epochs=epochs,
            options=options,
        )
        self._loader: PrivateLoader | None = None
        self._resumed: Mapping[str, Any] | None = None  # the state of the loader in the checkpoint that is restored
        self._logged: tuple[int, float] | None = None  # the steps that ε was last asked after, and that ε

    def get_epsilon(self, delta: float) -> float:
        """Returns ε at `delta` of everything that was trained in this process."""
        return self.engine.get_epsilon(delta)

    # -- making it private -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses settings of the Trainer that do not go with private training."""
        self._resumed = None  # Lightning restores callbacks after this hook
        if stage == "fit":
            refuse_trainer(trainer)
            if "accumulate" in self._arguments.options and pl_module.automatic_optimization:
                raise ConfigurationError(
                    "accumulate= is for a training_step that steps its optimizer itself. Here Lightning does: write "
                    "Trainer(accumulate_grad_batches=...) in its place."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes module, optimizer and loader private."""
        if len(trainer.optimizers) != 1:
            raise ConfigurationError(
                f"configure_optimizers returned {len(trainer.optimizers)} optimizers. Expected one, over all that is "
                "trained: every optimizer that sees the data has to be private, and which ones do cannot be seen. "
                "Put optimizers that step together into one privet.ChainedOptimizer. For a GAN, make the "
                "discriminator private in a loop of your own, by make_private."
            )
        unwrap(trainer, pl_module)
        watched, optimizer = self._watched(pl_module), trainer.optimizers[0]
        ranks, loader = trainer.world_size, training_loader(trainer)
        poisson, accumulate = self._arguments.options.get("poisson_sampling", True), trainer.accumulate_grad_batches
        try:
            self._loader = self._arguments.make_private(
                self.engine,
                module=watched,
                optimizer=optimizer,
                data_loader=loader_of_all(loader, ranks=ranks, poisson=poisson),
                epochs=planned_epochs(trainer, loader, together=ranks * self._arguments.accumulated(accumulate)),
                accumulate=accumulate,
                grad_scaler=grad_scaler(trainer),
            )
        except ProtocolError as error:
            error.add_note(
                "In Lightning: every fit makes its module private. For another fit build a new LightningModule, "
                "load_state_dict() what this one learned, and give PrivateTraining(engine=...) the same engine."
            )
            raise
        if self._resumed is not None:  # Lightning itself restores the loader in mid-epoch alone
            self._loader.load_state_dict(self._resumed)
        feed(trainer, self._loader)
        if self._log_clip_fraction:
            self.engine.collect_statistics()
        self.stopped_by_budget, self._logged = False, None
        self._stop_instead_of_raising(trainer, optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run that was resumed inside of a step."""
        assert self._loader is not None
        refuse_cut_step(trainer, self._loader.parts)

    def _watched(self, pl_module: LightningModule) -> nn.Module:
        """Returns the module whose calls are the forwards of training."""
        if self._module is not None:
            return pl_module.get_submodule(self._module)
        if is_overridden("forward", pl_module):
            return pl_module
        trained = {
            name: child
            for name, child in pl_module.named_children()
            if any(p.requires_grad for p in child.parameters())
        }
        if len(trained) == 1:
            return next(iter(trained.values()))
        raise ConfigurationError(
            f"this {type(pl_module).__name__} has no forward, and {len(trained)} parts that are trained: "
            f"{', '.join(trained)}. One call has to lead through all of them, for what happens outside of it is not "
            "seen. Write a forward that calls them, and call self(...) in training_step; or put them into one module, "
            "and name it: PrivateTraining(module=...)."
        )

    def _stop_instead_of_raising(self, trainer: Trainer, optimizer: Any) -> None:
        """Makes the step that would exceed the budget end `fit`; it is not taken."""

        def stopping(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def stopped(*args: Any, **kwargs: Any) -> Any:
                try:
                    return call(*args, **kwargs)
                except BudgetExceededError as error:
                    if not self.stopped_by_budget:
                        rank_zero_info(f"PrivateTraining ends this fit, and keeps the weights: {error}")
                    self.stopped_by_budget = trainer.should_stop = True
                    return None

            return stopped

        optimizer.step = stopping(optimizer.step)
        scaler: Any = grad_scaler(trainer)
        if scaler is not None:
            self._stop_scaler(scaler, stopping)

    def _stop_scaler(self, scaler: Any, stopping: Callable[..., Any]) -> None:
        """Makes a step that is refused where it is unscaled end `fit`: its gradient is released and billed there."""
        unscale, step = scaler.unscale_, scaler.step
        refused = False

        def unscaled(optimizer: Any) -> None:
            nonlocal refused
            refused = True  # until it was done
            unscale(optimizer)
            refused = False

        def stepped(*args: Any, **kwargs: Any) -> Any:
            nonlocal refused
            if refused:
                refused = False
                return None
            return step(*args, **kwargs)

        scaler.unscale_, scaler.step = stopping(unscaled), stopping(stepped)

    # -- what is shown -----------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs ε, as of the last step whose number is a multiple of `log_every_n_steps`, and what else is asked for."""
        step, every = trainer.global_step, max(getattr(trainer, "log_every_n_steps", 1), 1)
        if self._logged is None or (step % every == 0 and self._logged[0] != step):
            self._ask(step)
        self._log(on_step=True)
        if self._log_clip_fraction and (found := self.engine.statistics) is not None:
            name = "clip_fraction (not private)"
            self.log(name, found.clipped, prog_bar=True, on_step=True, on_epoch=False, batch_size=1)  # type: ignore[attr-defined]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs ε of all steps so far."""
        self._ask(trainer.global_step)
        self._log(on_step=False)

    def _ask(self, step: int) -> None:
        self._logged = step, self.engine.get_epsilon(self._arguments.delta(self.engine))

    def _log(self, *, on_step: bool) -> None:
        assert self._logged is not None
        self.log(  # type: ignore[attr-defined]  # Lightning puts it on every callback of a Trainer
            "epsilon",
            self._logged[1],
            prog_bar=True,
            on_step=on_step,
            on_epoch=not on_step,
            batch_size=1,
            sync_dist=not on_step,  # it is the same on all ranks; without it Lightning warns
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loader is. The ledger rides in the optimizer's state.

        As there is a state, Lightning warns if a run is resumed without this callback.
        """
        return {"loader": None if self._loader is None else self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes note of where the loader was, for `on_fit_start`."""
        self._resumed = state_dict["loader"]

    # -- errors ------------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds what the cause is in Lightning to errors whose words are of no framework."""
        if isinstance(exception, CoverageError):
            exception.add_note(
                "In Lightning: training_step has to call the module that is private (by default self(...), which runs "
                "forward), and to reach the trained parameters by that call alone. If it calls a part of the module, "
                "such as self.net(...), write PrivateTraining(module='net')."
            )
