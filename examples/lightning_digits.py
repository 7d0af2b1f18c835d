"""Trains a small convolutional network on handwritten digits under a privacy budget, with Lightning.

    pip install 'privet[lightning,demo]'
    python examples/lightning_digits.py                   --devices 2    for two processes

`PrivateTraining` is the one line that makes it private. Everything else is Lightning as ever: the progress bar shows ε,
and a run that is stopped goes on from its checkpoint with `--resume PATH`; ε is in it.

The data are the 1,797 digits (8x8 pixels) that scikit-learn carries. A fifth is held out for testing.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet.integrations.lightning import PrivateTraining

DELTA = 1e-5
BATCH_SIZE = 288
CLIP_NORM = 0.1

Batch = tuple[Tensor, Tensor]


class Digits(pl.LightningDataModule):
    """The digits, in two parts."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        # From 0 to 16, scaled by round constants: a mean and a deviation of the training digits would not be private.
        parts = train_test_split(images / 6 - 0.8, labels, test_size=0.2, random_state=0, stratify=labels)
        train, test, its_labels, test_labels = (torch.as_tensor(part) for part in parts)
        shaped = [each.float().view(-1, 1, 8, 8) for each in (train, test)]
        self.train, self.test = TensorDataset(shaped[0], its_labels), TensorDataset(shaped[1], test_labels)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Batch]:
        """Returns a plain loader: the callback draws its batches anew."""
        return DataLoader(self.train, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the loader of the digits that nothing is trained on."""
        return DataLoader(self.test, batch_size=360)


class Classifier(pl.LightningModule):
    """Two convolutions, normalised per example."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of each image."""
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean loss. It is not logged: it is of the training digits, and not private."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the accuracy on held-out digits."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1.4, momentum=0.9)


def parsed() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget at delta = 1e-5")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--resume", help="the path of a checkpoint", default=None)
    return parser.parse_args()


def main() -> None:
    """Trains, and shows what it costs."""
    options = parsed()
    pl.seed_everything(0, verbose=False)  # of the weights alone: batches and noise come from the operating system
    private = PrivateTraining(target_epsilon=options.epsilon, target_delta=DELTA, max_grad_norm=CLIP_NORM)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="auto" if options.devices == 1 else "cpu",
        devices=options.devices,
        strategy="auto" if options.devices == 1 else "ddp",
        callbacks=[private],
        logger=False,
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), datamodule=Digits(BATCH_SIZE // options.devices), ckpt_path=options.resume)
    if trainer.is_global_zero:
        accuracy = float(trainer.callback_metrics["accuracy"])
        spent = private.get_epsilon(DELTA)
        print(f"accuracy {accuracy:.1%} on held-out digits at ε = {spent:.2f}, δ = {DELTA:g}")


if __name__ == "__main__":
    main()
