"""What clip norm, learning rate, batch size and epochs do to the accuracy at one budget, on the handwritten digits.

    python -m benchmarks.choosing --out benchmarks/results            # some minutes
    python -m benchmarks.choosing --out benchmarks/results --plot     # only draw docs/images/choosing.png again

The network is small, so that the runs are quick: 64 pixels, 64 hidden units with tanh, 10 digits. Every run has the
same privacy: the noise is calibrated to the budget anew for its batch size and epochs. One number is changed at a time;
each point is the mean of three runs. Runs that are in the file of results already are not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F

from examples.digits import digits, evaluate
from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

DELTA, SEEDS = 1e-5, 3
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "choosing.png"


@dataclass(frozen=True)
class Choice:
    """The numbers that a user chooses."""

    epsilon: float = 3.0
    clip_norm: float = 0.1
    learning_rate: float = 1.4
    batch_size: int = 288
    epochs: int = 40

    def key(self) -> str:
        """Returns a name for the file of results."""
        return json.dumps(asdict(self))


BASE = Choice()
BUDGETS = (1.0, 8.0)
CLIP_NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATES = (0.05, 0.15, 0.45, 1.4, 4.2, 12.0)
BATCH_SIZES = (36, 72, 144, 288, 575)
EPOCHS = (2, 5, 10, 20, 40, 80)


def choices() -> Iterator[Choice]:
    """Yields every choice that the picture needs."""
    for norm in CLIP_NORMS:
        yield replace(BASE, clip_norm=norm)
        yield replace(BASE, clip_norm=norm, learning_rate=round(0.14 / norm, 4))
    for budget in BUDGETS:
        for rate in RATES:
            yield replace(BASE, epsilon=budget, learning_rate=rate)
        for epochs in EPOCHS:
            yield replace(BASE, epsilon=budget, epochs=epochs)
        for size in BATCH_SIZES:
            yield replace(BASE, epsilon=budget, batch_size=size)


def network() -> nn.Module:
    """Returns the network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def mechanism_of(choice: Choice, examples: int) -> Mechanism:
    """Returns what a run with these numbers releases, with the least noise that fits the budget."""
    rate = choice.batch_size / examples
    steps = round(choice.epochs / rate)
    mechanism = Mechanism(sampling=Poisson(rate), clipping=Flat(choice.clip_norm), noise=Gaussian(1.0), steps=steps)
    return mechanism.calibrated(epsilon=choice.epsilon, delta=DELTA)


def run(choice: Choice, mechanism: Mechanism, seed: int) -> float:
    """Returns the accuracy on held-out digits of one private training."""
    torch.manual_seed(seed)
    train, test = digits()
    model = network()
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=choice.learning_rate, momentum=0.9),
        mechanism=mechanism,
        loss_per_example=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
    )
    for batch in step.batches(train):
        step(batch)
    return evaluate(model, test)[1]


def draw(results: dict[str, Any]) -> None:
    """Draws the picture of the documentation."""

    def mean(choice: Choice) -> float:
        return 100 * statistics.fmean(results[choice.key()]["accuracy"])

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained", sharey=True)
    (norms, rates), (sizes, epochs) = axes
    norms.plot(CLIP_NORMS, [mean(replace(BASE, clip_norm=c)) for c in CLIP_NORMS], "o-", label="learning rate 1.4")
    coupled = [mean(replace(BASE, clip_norm=c, learning_rate=round(0.14 / c, 4))) for c in CLIP_NORMS]
    norms.plot(CLIP_NORMS, coupled, "s--", label="learning rate 0.14 / C")
    norms.set_xlabel("clip norm C (ε = 3)")
    for panel, values, name, label in (
        (rates, RATES, "learning_rate", "learning rate (C = 0.1)"),
        (sizes, BATCH_SIZES, "batch_size", "expected batch size (40 epochs)"),
        (epochs, EPOCHS, "epochs", "epochs (expected batch size 288)"),
    ):
        for budget, mark in zip(BUDGETS, ("v-", "^-"), strict=True):
            found = [mean(replace(BASE, epsilon=budget, **{name: value})) for value in values]
            panel.plot(values, found, mark, label=f"ε = {budget:g}")
        panel.set_xlabel(label)
    for panel in axes.flat:
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    norms.set_xticks(CLIP_NORMS, [f"{value:g}" for value in CLIP_NORMS])
    for panel, values in ((rates, RATES), (sizes, BATCH_SIZES), (epochs, EPOCHS)):
        panel.set_xticks(values, [f"{value:g}" for value in values])
    for panel in (norms, sizes):
        panel.set_ylabel("accuracy on held-out digits, %")
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main() -> None:
    """Makes the runs that are missing, and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for choosing.json")
    parser.add_argument("--plot", action="store_true", help="draw, and run nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "choosing.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": {}}
    results = found["results"]
    for choice in () if options.plot else dict.fromkeys(choices()):
        entry = results.setdefault(choice.key(), {"accuracy": []})
        mechanism = mechanism_of(choice, len(digits()[0]))
        entry["noise_multiplier"] = mechanism.noise.multiplier
        for seed in range(len(entry["accuracy"]), SEEDS):
            entry["accuracy"].append(round(run(choice, mechanism, seed), 4))
            found |= {
                "what": "accuracy on 360 held-out digits; seeds 0, 1, 2 of the first weights, noise without a seed",
                "date": datetime.now(UTC).date().isoformat(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(choice, entry["accuracy"], flush=True)
    draw(results)


if __name__ == "__main__":
    main()
