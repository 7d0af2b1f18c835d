"""What views, averages, corrected Adam and sharpness-aware steps bring at the same epsilon, on scikit-learn's digits.

    python -m benchmarks.better_learning --out benchmarks/results       # half an hour on one core
    python -m benchmarks.better_learning --short                        # shows that it runs

Every method has the same budget, number of steps and sampling rate, and its own learning rate: the one of a short grid
that is best on 240 held-out examples, by the mean over the seeds. Then its accuracy on 360 other examples is reported:
mean, spread (standard deviation over seeds) and the difference to plain DP-SGD seed by seed. The choice among learning
rates is not billed here: this compares methods, and publishes no model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.spine import machine
from privet import (
    AdamBC,
    Augmented,
    Flat,
    Gaussian,
    Mechanism,
    Poisson,
    PrivateStep,
    RandomCrop,
    SeveralReleases,
    SharpnessAware,
    WeightAverage,
)

DELTA, RATE, CLIP, RADIUS = 1e-5, 0.2, 0.3, 0.05
SGD_RATES, ADAM_RATES = (0.25, 0.5, 1.0), (0.01, 0.03, 0.1)
METHODS: dict[str, tuple[str, int, tuple[float, ...]]] = {
    "DP-SGD": ("sgd", 1, SGD_RATES),
    "4 views": ("sgd", 4, SGD_RATES),
    "DP-Adam": ("adam", 1, ADAM_RATES),
    "sharpness-aware": ("sam", 1, SGD_RATES),
    "DP-AdamBC": ("adambc", 1, ADAM_RATES),
}
AVERAGES = ("last", "moving average", "mean of the second half")
"""What is evaluated of each run: the weights of the end, and two averages. They cost nothing, so every run has them."""


def digits() -> dict[str, TensorDataset]:
    """Returns scikit-learn's digits: 1,197 to train on, 240 to choose by, 360 to report."""
    pictures, labels = load_digits(return_X_y=True)
    x = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 6 - 0.8
    y = torch.tensor(labels)
    rest, test = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    train, held = train_test_split(rest, test_size=240, random_state=0, stratify=y[rest])
    return {name: TensorDataset(x[rows], y[rows]) for name, rows in (("train", train), ("held", held), ("test", test))}


def network() -> nn.Module:
    """Returns two small convolutions, normalised per example, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 4 * 4, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # (rows,)
    """Returns the loss of each row."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of examples that a model names rightly."""
    x, y = data.tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "sgd": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "sam": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "adambc": lambda model, lr: AdamBC(model.parameters(), lr=lr),
}


def run(
    data: dict[str, TensorDataset], mechanism: Mechanism, kind: str, *, views: int, lr: float, seed: int
) -> dict[str, Any]:
    """Returns the accuracies of one run, by average and by part of the data, and the seconds of its steps."""
    torch.manual_seed(seed)
    model = network()
    optimizer = OPTIMIZERS[kind](model, lr)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=mechanism,
        loss_per_example=Augmented(loss, views=views, transform=RandomCrop(1)) if views > 1 else loss,
        accountant="rdp",
    )
    moving = WeightAverage(model, optimizer, decay=0.95)
    tail = WeightAverage(model, optimizer, start=(mechanism.steps or 0) // 2)
    begun = time.perf_counter()
    takes = SharpnessAware(step, radius=RADIUS) if kind == "sam" else step
    for batch in step.batches(data["train"]):
        takes(batch)
    seconds = time.perf_counter() - begun
    models = dict(zip(AVERAGES, (model.eval(), moving.averaged_model(), tail.averaged_model()), strict=True))
    return {
        "seconds": seconds,
        **{name: {part: accuracy(each, data[part]) for part in ("held", "test")} for name, each in models.items()},
    }


def compared(name: str, epsilon: float, *, steps: int, seeds: int, data: dict[str, TensorDataset]) -> list[Any]:
    """Returns one row for each average of a method, with its best learning rate."""
    kind, views, rates = METHODS[name]
    noise = SeveralReleases(1.0) if kind == "sam" else Gaussian(1.0)
    mechanism = Mechanism(sampling=Poisson(RATE), clipping=Flat(CLIP), noise=noise, steps=steps)
    mechanism = mechanism.calibrated(epsilon=epsilon, delta=DELTA)
    runs = {lr: [run(data, mechanism, kind, views=views, lr=lr, seed=seed) for seed in range(seeds)] for lr in rates}
    rows = []
    for average in AVERAGES:
        best = max(rates, key=lambda lr: statistics.mean(each[average]["held"] for each in runs[lr]))
        rows.append({
            "method": name,
            "average": average,
            "epsilon": epsilon,
            "noise_multiplier": mechanism.noise.multiplier,
            "lr": best,
            "accuracies": [each[average]["test"] for each in runs[best]],
            "seconds": statistics.median(each["seconds"] for each in runs[best]),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown."""
    plain = {r["epsilon"]: r["accuracies"] for r in rows if (r["method"], r["average"]) == ("DP-SGD", "last")}
    lines = ["| ε | method | weights | accuracy, mean ± spread | over DP-SGD, mean ± spread |", "|---|---|---|---|---|"]
    for r in rows:
        found = r["accuracies"]
        gains = [a - b for a, b in zip(found, plain[r["epsilon"]], strict=True)]
        lines.append(
            f"| {r['epsilon']:g} | {r['method']} | {r['average']} | {_percent(found)} | {_percent(gains, sign=True)} |"
        )
    return "\n".join(lines)


def _percent(values: list[float], *, sign: bool = False) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):{'+' if sign else ''}.1f} ± {100 * spread:.1f}"


def main() -> None:
    """Runs all methods, or those that are named, and writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0, 1.0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    if options.short:
        options.epsilon, options.seeds, options.steps = [3.0], 1, 5
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = digits()
    rows = [
        row
        for epsilon in options.epsilon
        for name in options.methods
        for row in compared(name, epsilon, steps=options.steps, seeds=options.seeds, data=data)
    ]
    print(table(rows))
    if options.out is not None:
        told = {"machine": machine(), "steps": options.steps, "rate": RATE, "clip_norm": CLIP, "delta": DELTA}
        (options.out / "better_learning.json").write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")
        (options.out / "better_learning.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
