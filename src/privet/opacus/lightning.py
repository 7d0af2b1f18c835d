"""A Lightning data module whose training loader draws by Poisson sampling, at Opacus's name."""

from __future__ import annotations

from typing import Any

import torch

from privet.errors import ConfigurationError
from privet.opacus.data_loader import DPDataLoader

try:
    import pytorch_lightning as pl
except ImportError as error:
    raise ConfigurationError(
        "privet.opacus.lightning needs Lightning, which is not installed. Run: pip install privet[lightning]"
    ) from error

__all__ = ["DPLightningDataModule"]


class DPLightningDataModule(pl.LightningDataModule):
    """Wraps a data module: its training loader draws each batch by Poisson sampling, all else is passed on.

    Args:
        datamodule: the data module.
        generator: makes the batches reproducible; for tests.
    """

    def __init__(self, datamodule: pl.LightningDataModule, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.datamodule = datamodule
        self.generator = generator

    def prepare_data(self) -> None:
        """Prepares the wrapped module's data."""
        self.datamodule.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Sets the wrapped module up."""
        self.datamodule.setup(stage)  # type: ignore[arg-type]

    def train_dataloader(self) -> DPDataLoader:
        """Returns the training loader, with Poisson sampling."""
        return DPDataLoader.from_data_loader(self.datamodule.train_dataloader(), generator=self.generator)

    def val_dataloader(self) -> Any:
        """Returns the validation loader."""
        return self.datamodule.val_dataloader()

    def test_dataloader(self) -> Any:
        """Returns the test loader."""
        return self.datamodule.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Returns the loader of predictions."""
        return self.datamodule.predict_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch as the wrapped module does."""
        return self.datamodule.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes a batch as the wrapped module does, before it is moved."""
        return self.datamodule.on_before_batch_transfer(batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Changes a batch as the wrapped module does, after it was moved."""
        return self.datamodule.on_after_batch_transfer(batch, dataloader_idx)
