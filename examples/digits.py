"""Trains a small convolutional network on handwritten digits under a privacy budget, and shows what that costs.

    make demo        or        python examples/digits.py --epsilon 3 --out somewhere

The data are the 1,797 digits (8x8 pixels) that scikit-learn carries. A fifth is held out for testing and was used for
nothing else: the recipe below was searched for on a part of the training digits. That search is not in ε; it is fair
here because the digits are public, and would not be on data that are not.

What is printed while it trains, loss and accuracy, is of the held-out digits: about the training digits nothing is
shown but what the released model says, which is what ε covers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine

mpl.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Found on a part of the training digits."""

    batch_size: int
    epochs: int
    learning_rate: float
    momentum: float = 0.0


PRIVATE = Recipe(batch_size=288, epochs=40, learning_rate=1.4, momentum=0.9)
PLAIN = Recipe(batch_size=64, epochs=30, learning_rate=0.1, momentum=0.9)
CLIP_NORM = 0.1
DELTA = 1e-5


@dataclass
class History:
    """What a run showed, epoch by epoch."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    epsilon: list[float] = field(default_factory=list)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns the training digits and the held-out ones."""
    images, labels = load_digits(return_X_y=True)
    # From 0 to 16, scaled by round constants: a mean and a deviation of the training digits would not be private.
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 6 - 0.8
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=labels)
    targets = torch.tensor(labels)
    return TensorDataset(pixels[train], targets[train]), TensorDataset(pixels[test], targets[test])


def network() -> nn.Module:
    """Returns the network: two convolutions, normalised per example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def evaluate(model: nn.Module, dataset: TensorDataset) -> tuple[float, float]:
    """Returns the mean loss and the accuracy."""
    images, labels = dataset.tensors
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(images)
    model.train()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    after_epoch: Callable[[History], None],
) -> History:
    """Returns the history of an ordinary training loop: nothing in it knows about privacy."""
    history = History()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        after_epoch(history)
    return history


def watched(
    title: str,
    run: Callable[[Callable[[History], None]], History],
    *,
    model: nn.Module,
    test: TensorDataset,
    epochs: int,
    epsilon: Callable[[], float] | None,
    console: Console,
) -> History:
    """Returns the history of a run, shown as it goes."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=epochs, figures="")

        def after_epoch(history: History) -> None:
            loss, accuracy = evaluate(model, test)
            history.loss.append(loss)
            history.accuracy.append(accuracy)
            figures = f"loss {loss:.3f}  accuracy {accuracy:.1%}"
            if epsilon is not None:
                history.epsilon.append(epsilon())
                figures += f"  ε {history.epsilon[-1]:.2f}"
            progress.update(task, advance=1, figures=figures)

        return run(after_epoch)


def train_privately(
    training: TensorDataset,
    test: TensorDataset,
    *,
    epochs: int,
    target_epsilon: float,
    checkpoint: Path,
    console: Console,
) -> tuple[History, float]:
    """Returns the history of the private run and its noise multiplier; saves a checkpoint."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=PRIVATE.learning_rate, momentum=PRIVATE.momentum)
    loader = DataLoader(training, batch_size=PRIVATE.batch_size)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, epochs=epochs,
        target_epsilon=target_epsilon, target_delta=DELTA, max_grad_norm=CLIP_NORM,
    )  # fmt: skip
    history = watched(
        "with privacy   ",
        lambda after: train(model, optimizer, loader, epochs=epochs, after_epoch=after),
        model=model, test=test, epochs=epochs, epsilon=lambda: engine.get_epsilon(delta=DELTA), console=console,
    )  # fmt: skip
    engine.save_checkpoint(checkpoint, module=model, optimizer=optimizer)
    return history, engine.mechanisms[0].noise.multiplier


def train_plainly(training: TensorDataset, test: TensorDataset, *, epochs: int, console: Console) -> History:
    """Returns the history of the same network without privacy, with a recipe that suits it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAIN.learning_rate, momentum=PLAIN.momentum)
    loader = DataLoader(training, batch_size=PLAIN.batch_size, shuffle=True)
    return watched(
        "without privacy",
        lambda after: train(model, optimizer, loader, epochs=epochs, after_epoch=after),
        model=model, test=test, epochs=epochs, epsilon=None, console=console,
    )  # fmt: skip


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Returns the seconds that an ordinary step takes."""
    begun = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - begun


def step_seconds() -> tuple[float, float]:
    """Returns the median times of a step with privacy and without, taken in turns on the same random batches."""
    random = TensorDataset(torch.randn(1437, 1, 8, 8), torch.randint(10, (1437,)))
    plain, private = network(), network()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    private, private_optimizer, loader = PrivacyEngine().make_private(
        module=private, optimizer=torch.optim.SGD(private.parameters(), lr=0.1),
        data_loader=DataLoader(random, batch_size=PRIVATE.batch_size), noise_multiplier=1.0, max_grad_norm=CLIP_NORM,
    )  # fmt: skip
    pairs = [
        (one_step(private, private_optimizer, *batch), one_step(plain, plain_optimizer, *batch))
        for _ in range(6)
        for batch in loader
    ]
    ours, theirs = zip(*pairs[3:], strict=True)
    return statistics.median(ours), statistics.median(theirs)


def plot(private: History, plain: History, path: Path) -> None:
    """Draws accuracy and ε over the epochs."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained")
    epochs = range(1, len(private.accuracy) + 1)
    upper.plot(epochs, [100 * each for each in private.accuracy], label=f"with privacy, ε = {private.epsilon[-1]:.2f}")
    upper.plot(
        range(1, len(plain.accuracy) + 1),
        [100 * each for each in plain.accuracy],
        color="0.6", linestyle="--", label="without privacy",
    )  # fmt: skip
    upper.set_ylabel("accuracy on held-out digits, %")
    upper.legend(loc="lower right")
    lower.plot(epochs, private.epsilon, color="tab:red")
    lower.set_ylabel(f"ε so far, at δ = {DELTA:g}")
    lower.set_xlabel("epoch")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the demonstration and prints what came of it."""
    parser = argparse.ArgumentParser(description="Handwritten digits under a privacy budget.")
    parser.add_argument("--epsilon", type=float, default=8.0, help="the budget, at δ = 1e-5 (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for plot and checkpoint")
    parser.add_argument("--short", action="store_true", help="three epochs of either run, to see that the script runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # on a network this small, a second thread only waits
    console = Console()
    training, test = digits()
    console.print(
        f"{len(training)} handwritten digits to train on, {len(test)} held out; ε = {options.epsilon:g}, δ = {DELTA:g}"
    )

    checkpoint, picture = options.out / "digits.pt", options.out / "digits.png"
    private, noise = train_privately(
        training, test, epochs=3 if options.short else PRIVATE.epochs, target_epsilon=options.epsilon,
        checkpoint=checkpoint, console=console,
    )  # fmt: skip
    plain = train_plainly(training, test, epochs=3 if options.short else PLAIN.epochs, console=console)
    plot(private, plain, picture)

    ours, theirs = step_seconds()
    table = Table("", "with privacy", "without")
    table.add_row("accuracy on held-out digits", f"{private.accuracy[-1]:.1%}", f"{plain.accuracy[-1]:.1%}")
    table.add_row(f"ε at δ = {DELTA:g}", f"{private.epsilon[-1]:.3f}", "∞")
    table.add_row("noise multiplier, clip norm", f"{noise:.3f}, {CLIP_NORM:g}", "-")
    step = f"a step of about {PRIVATE.batch_size} examples"
    table.add_row(step, f"{1e3 * ours:.1f} ms ({ours / theirs:.2f}x)", f"{1e3 * theirs:.1f} ms")
    console.print(table)
    console.print(f"plot: {picture}\ncheckpoint: {checkpoint}")


if __name__ == "__main__":
    main()
