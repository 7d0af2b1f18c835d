"""Audits private training on the handwritten digits at several ε, and draws lower bounds beside the claims.

    python examples/audit.py --out somewhere        (a few minutes; --quick for one ε in seconds)

Two audits of one training. The first measures the mechanism: canaries with gradients of their own go through loader,
clipping, noise and optimizer. The second plants digits with wrong labels by secret coins, trains as always, and guesses
the coins from the losses of the finished model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from privet import PrivacyEngine
from privet.audit import audit_mechanism, plant

DELTA = 1e-5
EPOCHS = 30
BATCH_SIZE = 256


def digits() -> TensorDataset:
    """Returns scikit-learn's digits as tensors of shape (1797, 64)."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))


def network() -> nn.Module:
    """Returns a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def loss_per_example(model: nn.Module, batch: Any) -> Tensor:  # (B,)
    """Returns the loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(model: nn.Module, dataset: Dataset[Any], *, epsilon: float | None, epochs: int = EPOCHS) -> Any:
    """Trains a model under a budget, or without privacy, and returns the engine."""
    engine = PrivacyEngine()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5 if epsilon is None else 1.0, momentum=0.9)
    loader: Any = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=epsilon is None)
    if epsilon is not None:
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            target_epsilon=epsilon,
            target_delta=DELTA,
            epochs=epochs,
            max_grad_norm=0.3,
        )
    for _ in range(epochs if epsilon is not None else 4 * epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return engine


def audited(epsilon: float | None, canaries: int) -> dict[str, Any]:
    """Returns what the audits of one training say."""
    began = time.perf_counter()
    found: dict[str, Any] = {"claimed": epsilon}
    if epsilon is not None:
        mechanism = audit_mechanism(
            lambda model, dataset: train(model, dataset, epsilon=epsilon, epochs=4),
            model=network(),
            dataset=digits(),
            delta=DELTA,
            canaries=canaries,
        )
        found |= {"claim_of_mechanism": mechanism.claimed, "mechanism": mechanism.lower_bound}
        found |= {"passed": mechanism.passed, "seconds_of_mechanism": mechanism.seconds}
    planted = plant(digits(), 300, "mislabelled")
    model = network()
    before = planted.losses(model, loss_per_example)
    engine = train(model, planted.dataset, epsilon=epsilon)
    scores = planted.losses(model, loss_per_example) - before
    training = planted.audit(scores, delta=DELTA, claimed=None if epsilon is None else engine)
    found |= {"training": training.lower_bound, "training_gaussian": training.lower_bound_gaussian}
    return found | {"guessed": training.accuracy, "seconds": time.perf_counter() - began}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the results as a table."""
    table = Table(title=f"lower bounds on ε at δ = {DELTA:g}")
    for name in ("claimed", "mechanism", "training", "training, Gaussian", "coins guessed", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            "none" if row["claimed"] is None else f"{row['claimed']:g}",
            f"{row['mechanism']:.2f}" if "mechanism" in row else "",
            f"{row['training']:.2f}",
            f"{row['training_gaussian']:.2f}",
            f"{row['guessed']:.0%}",
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


def main() -> None:
    """Runs the audits, and writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for audits.json and audits.png")
    parser.add_argument("--quick", action="store_true", help="one ε, few canaries")
    options = parser.parse_args()
    budgets = [4.0] if options.quick else [1.0, 4.0, 16.0, None]
    with Progress(console=Console(stderr=True)) as progress:
        rows = [audited(epsilon, 400 if options.quick else 2000) for epsilon in progress.track(budgets)]
    show(rows)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "audits.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    private = [row for row in rows if row["claimed"] is not None]
    from privet.audit.plots import plot_bounds  # after the numbers: they do not need matplotlib

    axes = plot_bounds(
        [row["claimed"] for row in private],
        {
            "mechanism": [row["mechanism"] for row in private],
            "training, by losses": [row["training_gaussian"] for row in private],
        },
    )
    axes.get_figure().savefig(options.out / "audits.png", dpi=150)


if __name__ == "__main__":
    main()
