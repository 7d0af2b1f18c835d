"""Trains a small convolutional network on handwritten digits under a privacy budget, on several processes.

    torchrun --nproc-per-node 2 examples/ddp.py        or        python examples/ddp.py        for one process

Both give the same batches by law, the same noise by law, and the same ε: the number of processes is a matter of time
alone. The lines that a run on several processes needs are those of ordinary training, in this order: the process group,
DistributedDataParallel, the optimizer, make_private. No DistributedSampler: the private loader gives each process its
share of every batch.

The data are the 1,797 digits (8x8 pixels) that scikit-learn carries. A fifth is held out for testing.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine

DELTA = 1e-5
BATCH_SIZE = 288
CLIP_NORM = 0.1


def network() -> nn.Module:
    """Returns the network: two convolutions, normalised per example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """Returns the training digits, and the images and labels of the held-out ones. Every process has all of them."""
    images, labels = load_digits(return_X_y=True)
    # From 0 to 16, scaled by round constants: a mean and a deviation of the training digits would not be private.
    parts = train_test_split(images / 6 - 0.8, labels, test_size=0.2, random_state=0, stratify=labels)
    train, test, its_labels, test_labels = (torch.as_tensor(part) for part in parts)
    shaped = [each.float().view(-1, 1, 8, 8) for each in (train, test)]
    return TensorDataset(shaped[0], its_labels), shaped[1], test_labels


def parsed() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0, help="the privacy budget at delta = 1e-5")
    parser.add_argument("--epochs", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    """Trains, and shows what it costs, on rank 0."""
    options = parsed()
    several = "RANK" in os.environ  # torchrun sets it
    if several:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    first = not several or dist.get_rank() == 0
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    console = Console(quiet=not first)

    torch.manual_seed(0)
    train, images, labels = digits()
    model = network().to(device)
    if several:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.4, momentum=0.9)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(train, batch_size=BATCH_SIZE),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=options.epochs,
        max_grad_norm=CLIP_NORM,
    )
    console.print(engine)
    for _ in track(range(options.epochs), description="training", console=console):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs.to(device)), targets.to(device)).backward()
            optimizer.step()

    model.eval()
    with torch.no_grad():
        accuracy = float((model(images.to(device)).argmax(1).cpu() == labels).double().mean())
    console.print(f"accuracy {accuracy:.1%} on held-out digits at ε = {engine.get_epsilon(DELTA):.2f}, δ = {DELTA:g}")
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
