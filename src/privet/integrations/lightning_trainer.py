"""What a Lightning Trainer has to be for private training, and what is changed in it. All access to its inside is here.

setting of the Trainer                          here
automatic and manual optimization               both, with one optimizer
strategy                                        one device, or DDP: its wrapper is taken off, for its reducer would wait
precision                                       32, 64, bf16-mixed, bf16-true, 16-mixed
accumulate_grad_batches                         virtual steps: so many physical batches are one logical batch
gradient_clip_val                               refused: gradients are clipped example by example, before they are added
ddp_spawn, ddp_notebook                         refused: the ledger would end with the processes that fit starts
overfit_batches, reloading of loaders, ...      refused: their batches would not be those that are accounted
callbacks that train in order to tune           refused: what they do is on no ledger
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from privet.errors import ConfigurationError
from privet.sampling import PrivateLoader

__all__ = [
    "Feed",
    "feed",
    "grad_scaler",
    "planned_epochs",
    "refuse_cut_step",
    "refuse_trainer",
    "training_loader",
    "unwrap",
]

_REFUSED_CALLBACKS = {
    BatchSizeFinder: "it trains in order to find a batch size, and the batch size is part of the privacy accounting",
    LearningRateFinder: "it trains on the private data before training is private",
    GradientAccumulationScheduler: "a step would be of another number of examples than the sampling rate says",
}


@final
class Feed:
    """The private loader as Lightning sees it: batches, a length and a state. It is no DataLoader, and not rebuilt.

    Args:
        loader: the private loader.
    """

    def __init__(self, loader: PrivateLoader) -> None:
        self.loader = loader
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loader is, which Lightning saves in the middle of an epoch too."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.loader.load_state_dict(state)


def refuse_trainer(trainer: Any) -> None:
    """Raises ConfigurationError for a Trainer whose settings do not go with private training, before it trains."""
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"the Trainer is a {type(trainer).__module__}.{type(trainer).__name__}. Expected that of lightning 2. "
            "Write `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`."
        )
    settings: Any = trainer  # most of its attributes are set elsewhere, and are unknown to the type checker
    for callback in settings.callbacks:
        for kind, reason in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"{kind.__name__} is among the callbacks: {reason}. Remove it.")
    strategy = settings.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise ConfigurationError(
            f"the strategy is {type(strategy).__name__}. Expected one device, or strategy='ddp'. For sharded models "
            "use privet with fully_shard, in a loop of your own (docs/distributed.md)."
        )
    if getattr(strategy, "_start_method", "popen") != "popen":
        raise ConfigurationError(
            f"the strategy starts its processes by {settings.strategy._start_method!r}, as ddp_spawn and ddp_notebook "  # noqa: SLF001
            "do. They end with fit, and the ledger with them: afterwards this process would say that nothing was "
            "spent. Expected processes that run the whole script. Write strategy='ddp', in a script."
        )
    if getattr(strategy, "_ddp_comm_hook", None) is not None or getattr(strategy, "_ddp_comm_state", None) is not None:
        raise ConfigurationError(
            "the strategy has a communication hook, through which no gradient would go: clipped sums are added up "
            "before the noise. Leave ddp_comm_hook= and ddp_comm_state= away."
        )
    if settings.gradient_clip_val is not None:
        raise ConfigurationError(
            f"gradient_clip_val={settings.gradient_clip_val} would have no effect: each example's gradient is clipped, "
            "to max_grad_norm of PrivateTraining, before gradients are added up. Leave it away."
        )
    if settings.overfit_batches:
        raise ConfigurationError("overfit_batches= takes the same batches every time. Leave it away.")
    if settings.reload_dataloaders_every_n_epochs:
        raise ConfigurationError(
            "reload_dataloaders_every_n_epochs= would replace the private loader in the middle of training. Leave it "
            "away."
        )


def grad_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """Returns what precision="16-mixed" scales losses with, and None for other precisions."""
    plugin: Any = trainer.precision_plugin
    found: torch.amp.GradScaler | None = getattr(plugin, "scaler", None)
    return found


def unwrap(trainer: Trainer, module: LightningModule) -> None:
    """Takes DistributedDataParallel off the module: private training adds up clipped sums itself, before the noise."""
    trainer.strategy.model = module


def training_loader(trainer: Trainer) -> DataLoader[Any]:
    """Returns the loader that `fit` is to train on, as its user made it.

    Raises:
        ConfigurationError: if it is not one DataLoader.
    """
    found = trainer.fit_loop._data_source.dataloader()  # noqa: SLF001 - it may be an argument of fit or a hook
    if isinstance(found, PrivateLoader):
        raise ConfigurationError(
            "the training loader was made private before. Give Trainer.fit the loader that it was made from, and leave "
            "make_private to PrivateTraining."
        )
    if not isinstance(found, DataLoader):
        raise ConfigurationError(
            f"the training loader is a {type(found).__name__}. Expected one torch DataLoader: several at once would "
            "need one ledger entry for each of their batches. Give one, over a dataset of tuples."
        )
    return found


def feed(trainer: Trainer, loader: PrivateLoader) -> None:
    """Makes `fit` train on the private loader.

    Raises:
        ConfigurationError: if `limit_train_batches` would end an epoch inside of a logical batch.
    """
    loop: Any = trainer.fit_loop
    if loop._data_fetcher is not None:  # noqa: SLF001 - Trainer.estimated_stepping_batches has set up the user's own
        loop._data_fetcher.teardown()  # noqa: SLF001
    loop._combined_loader = None  # noqa: SLF001
    loop._data_source.instance = Feed(loader)  # noqa: SLF001
    limit, parts = trainer.limit_train_batches, loader.parts
    taken = int(len(loader) * limit) if isinstance(limit, float) else min(len(loader), limit or 0)
    if taken % parts:
        raise ConfigurationError(
            f"limit_train_batches={limit} ends an epoch after {taken} batches, in the middle of a step, which "
            f"accumulates {parts}. Expected a multiple of it."
        )


def refuse_cut_step(trainer: Trainer, parts: int) -> None:
    """Raises ConfigurationError if the run was resumed inside of a step: its first batches come again."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if done % parts:
        raise ConfigurationError(
            f"the checkpoint was written after {done} batches of its epoch, in the middle of a step, which accumulates "
            f"{parts}. The sum of these batches is in no checkpoint. Expected one that was written between steps: by "
            f"ModelCheckpoint(every_n_train_steps=...), or with val_check_interval a multiple of {parts}."
        )


def planned_epochs(trainer: Trainer, loader: DataLoader[Any], *, together: int) -> int | None:
    """Returns how many passes over the data the Trainer is set to take, or None if it does not say.

    Args:
        trainer: the Trainer.
        loader: of the user.
        together: how many of its batches make one step: of all ranks, and all that are accumulated.
    """
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        return trainer.max_epochs or None
    if trainer.max_steps >= 1 and loader.batch_size is not None:
        steps_per_pass = -(-len(loader.dataset) // (loader.batch_size * together))  # type: ignore[arg-type]
        return -(-trainer.max_steps // steps_per_pass)
    return None
