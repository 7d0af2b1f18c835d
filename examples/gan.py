"""Trains a generator of handwritten digits whose discriminator learns under a privacy budget: a private GAN.

    python examples/gan.py
    python examples/gan.py --short                  # a few seconds: shows that the script runs

Only the discriminator sees the data, so only the discriminator is made private. The generator learns from nothing but
the discriminator, and what is computed from a private result is private too.

A row of the batch is one real digit and one made-up digit beside it, both of the same label: the loss of a row depends
on one example of the data. What comes out is judged by a classifier that is trained on made-up digits alone, and tested
on real ones.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine

DELTA = 1e-5
LATENT, PIXELS, LABELS = 16, 64, 10


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns scikit-learn's digits, pixels from -1 to 1: 1,437 to train on and 360 held out."""
    pictures, labels = load_digits(return_X_y=True)
    pixels, targets = torch.tensor(pictures, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    return TensorDataset(pixels[train], targets[train]), TensorDataset(pixels[test], targets[test])


def generator() -> nn.Module:
    """Returns a network that turns noise and a label into a picture."""
    return nn.Sequential(nn.Linear(LATENT + LABELS, 128), nn.ReLU(), nn.Linear(128, PIXELS), nn.Tanh())


def discriminator() -> nn.Module:
    """Returns a network that scores a picture and its label: high for a real one."""
    return nn.Sequential(nn.Linear(PIXELS + LABELS, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))


def made_up(makes: nn.Module, labels: Tensor) -> Tensor:  # (B,) -> (B, PIXELS)
    """Returns a picture for each label."""
    return makes(torch.cat((torch.randn(len(labels), LATENT), F.one_hot(labels, LABELS)), 1))


def labeled(pictures: Tensor, labels: Tensor) -> Tensor:  # (B, PIXELS + LABELS)
    """Returns pictures with their labels beside them."""
    return torch.cat((pictures, F.one_hot(labels, LABELS)), 1)


def usefulness(makes: nn.Module, test: TensorDataset) -> float:
    """Returns the accuracy on real digits of a classifier that was trained on made-up ones alone."""
    labels = torch.arange(LABELS).repeat(200)
    with torch.no_grad():
        pictures = made_up(makes, labels)
    classifier = nn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, LABELS))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(classifier(pictures), labels).backward()
        optimizer.step()
    real, truth = test.tensors
    return (classifier(real).argmax(1) == truth).float().mean().item()


def main() -> None:
    """Trains, and prints what came of it."""
    parser = argparse.ArgumentParser(description="A private GAN on handwritten digits.")
    parser.add_argument("--epsilon", type=float, default=8.0, help="the budget, at δ = 1e-5 (default: 8)")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; noise and batches have no seed")
    parser.add_argument("--short", action="store_true", help="three epochs")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train, test = digits()
    epochs = 3 if options.short else options.epochs

    makes, judges = generator(), discriminator()
    makes_optimizer = torch.optim.Adam(makes.parameters(), lr=2e-3, betas=(0.5, 0.999))
    engine = PrivacyEngine()
    judges, judges_optimizer, loader = engine.make_private_with_epsilon(
        module=judges,
        optimizer=torch.optim.Adam(judges.parameters(), lr=2e-3, betas=(0.5, 0.999)),
        data_loader=DataLoader(train, batch_size=144),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=1.0,
    )
    real_one, made_up_one = torch.ones(1), torch.zeros(1)
    for epoch in range(1, epochs + 1):
        for pictures, labels in loader:
            # The private step: each row holds a real picture and a made-up one, (B, 2, PIXELS + LABELS).
            with torch.no_grad():
                beside = made_up(makes, labels)
            pairs = torch.stack((labeled(pictures, labels), labeled(beside, labels)), 1)
            truth = torch.stack((real_one, made_up_one)).expand(len(pairs), 2, 1)
            judges_optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(judges(pairs), truth).backward()
            judges_optimizer.step()

            # The generator's step, with a discriminator that does not learn from it: no data are in it.
            judges.eval().requires_grad_(False)
            wanted = torch.randint(LABELS, (144,))
            makes_optimizer.zero_grad()
            score = judges(labeled(made_up(makes, wanted), wanted))
            F.binary_cross_entropy_with_logits(score, torch.ones_like(score)).backward()
            makes_optimizer.step()
            judges.train().requires_grad_(True)
        if epoch % max(1, epochs // 10) == 0:
            print(
                f"epoch {epoch:3}: a classifier trained on made-up digits names {usefulness(makes, test):.1%} of the "
                f"real ones, ε = {engine.get_epsilon(delta=DELTA):.3f} at δ = {DELTA:g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
