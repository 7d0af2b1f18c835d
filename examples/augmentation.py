"""Trains on several augmented views of each picture, at no price in ε: augmentation multiplicity.

    python examples/augmentation.py
    python examples/augmentation.py --short         # a few seconds: shows that the script runs

Each example of a batch is shown K times, shifted by up to a pixel each time, and its gradient is the mean over its K
views, formed before clipping (De et al., "Unlocking High-Accuracy Differentially Private Image Classification through
Scale", 2022). One example still adds one clipped gradient, so that ε is the same for any K. Views as further rows of
the batch would be wrong: each row would be clipped by itself, and a person would count K times.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from privet import Augmented, Flat, Gaussian, Mechanism, Poisson, PrivateStep, RandomCrop

DELTA = 1e-5


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns scikit-learn's digits, 1,437 to train on and 360 held out."""
    pictures, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 6 - 0.8
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    targets = torch.tensor(labels)
    return TensorDataset(pixels[train], targets[train]), TensorDataset(pixels[test], targets[test])


def network() -> nn.Module:
    """Returns two convolutions, normalised per example, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # (rows,)
    """Returns the loss of each row."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(train_set: TensorDataset, *, views: int, mechanism: Mechanism, seed: int) -> tuple[nn.Module, float]:
    """Returns the trained model, and ε."""
    torch.manual_seed(seed)
    model = network()
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.4, momentum=0.9),
        mechanism=mechanism,
        loss_per_example=Augmented(loss, views=views, transform=RandomCrop(1)) if views > 1 else loss,
    )
    for batch in step.batches(train_set):
        step(batch)
    return model, step.epsilon(delta=DELTA)


def main() -> None:
    """Trains with one view and with several, and prints what came of it."""
    parser = argparse.ArgumentParser(description="Several views of each picture for the same ε.")
    parser.add_argument("--epsilon", type=float, default=3.0, help="the budget, at δ = 1e-5 (default: 3)")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="few steps, one seed, two views")
    options = parser.parse_args()
    numbers, seeds, steps = ([1, 2], 1, 20) if options.short else (options.views, options.seeds, 200)
    train_set, test = digits()
    pictures, labels = test.tensors
    mechanism = Mechanism(sampling=Poisson(rate=0.2), clipping=Flat(0.1), noise=Gaussian(1.0), steps=steps)
    mechanism = mechanism.calibrated(epsilon=options.epsilon, delta=DELTA)
    for views in numbers:
        begun, found = time.perf_counter(), []
        for seed in range(seeds):
            model, epsilon = train(train_set, views=views, mechanism=mechanism, seed=seed)
            model.eval()
            with torch.no_grad():
                found.append((model(pictures).argmax(1) == labels).float().mean().item())
        print(
            f"{views} views: accuracy {', '.join(f'{each:.1%}' for each in found)}, ε = {epsilon:.2f} at δ = {DELTA:g}"
            f", {(time.perf_counter() - begun) / seeds:.1f} s a run"
        )


if __name__ == "__main__":
    main()
