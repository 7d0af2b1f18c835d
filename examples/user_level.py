"""Trains a model under a budget that protects people, each of whom has many records.

    python examples/user_level.py
    python examples/user_level.py --short           # a few seconds: shows that the script runs

An ε for one record is weak for a person with fifty of them. Here a row of the batch is a person: a tensor of all
records of that person, filled up to one length, and a mask that says which of them are real. The loss of a person is
the mean over the person's own records, so that a gradient per row is a gradient per person, and clipping and noise
protect the whole person. Sampling draws persons too.

The data are made up: 4,000 people with 1 to 30 readings of 8 sensors each, and a habit that shifts all readings of one
person. What is to be learned is the activity behind a reading, one of four.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

DELTA = 1e-5
SENSORS, ACTIVITIES, MOST_RECORDS = 8, 4, 30
# What an activity looks like to the sensors. Of the world, not of a person.
PATTERNS = torch.randn(ACTIVITIES, SENSORS, generator=torch.Generator().manual_seed(7))


def people(count: int, *, seed: int) -> TensorDataset:
    """Returns readings (N, R, S), activities (N, R) and the mask of real records (N, R) of N people."""
    drawn = torch.Generator().manual_seed(seed)
    activities = torch.randint(ACTIVITIES, (count, MOST_RECORDS), generator=drawn)
    habit = 0.7 * torch.randn(count, 1, SENSORS, generator=drawn)
    noise = torch.randn(count, MOST_RECORDS, SENSORS, generator=drawn)
    numbers = torch.randint(1, MOST_RECORDS + 1, (count, 1), generator=drawn)
    mask = torch.arange(MOST_RECORDS) < numbers
    return TensorDataset(PATTERNS[activities] + habit + noise, activities, mask)


def loss_per_person(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:  # (B,)
    """Returns for each person the mean loss over the person's own records."""
    readings, activities, mask = batch
    losses = F.cross_entropy(model(readings).transpose(1, 2), activities, reduction="none")  # (B, R)
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of real records whose activity the model names."""
    readings, activities, mask = data.tensors
    model.eval()
    with torch.no_grad():
        right = model(readings).argmax(-1) == activities
    model.train()
    return right[mask].float().mean().item()


def main() -> None:
    """Trains, and prints what came of it."""
    parser = argparse.ArgumentParser(description="A budget for people, not for records.")
    parser.add_argument("--epsilon", type=float, default=4.0, help="the budget of a person, at δ = 1e-5 (default: 4)")
    parser.add_argument("--short", action="store_true", help="fewer people, fewer steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    count, steps = (1000, 20) if options.short else (4000, 200)
    train, held_out = people(count, seed=1), people(500, seed=2)

    mechanism = Mechanism(sampling=Poisson(rate=0.1), clipping=Flat(1.0), noise=Gaussian(1.0), steps=steps)
    mechanism = mechanism.calibrated(epsilon=options.epsilon, delta=DELTA)
    model = nn.Sequential(nn.Linear(SENSORS, 32), nn.ReLU(), nn.Linear(32, ACTIVITIES))
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        mechanism=mechanism,
        loss_per_example=loss_per_person,
        unit="user",  # said wherever ε is said; it changes no number
    )
    print(f"{count} people, {int(train.tensors[2].sum())} records; noise multiplier {mechanism.noise.multiplier:.3f}")
    print(f"accuracy on the records of other people: {accuracy(model, held_out):.1%} before")
    for batch in step.batches(train):
        step(batch)
    print(
        f"accuracy on the records of other people: {accuracy(model, held_out):.1%} after, "
        f"ε = {step.epsilon(delta=DELTA):.2f} at δ = {DELTA:g} for all records of one person"
    )


if __name__ == "__main__":
    main()
