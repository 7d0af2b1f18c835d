"""Trains a small convolutional network on handwritten digits under a privacy budget, with Accelerate.

    pip install 'privet[huggingface,demo]'
    python examples/accelerate_digits.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_digits.py

The last line starts two processes. Without GPUs write ACCELERATE_USE_CPU=true before it: on CPUs, Accelerate itself
starts several processes through MPI alone.

`prepare` takes the place of `accelerator.prepare` for model, optimizer and training loader. The loop is that of
Accelerate. With `--save FOLDER` its state is written after every epoch, and with `--resume FOLDER` a run goes on from
there; ε is in it.

The data are the 1,797 digits (8x8 pixels) that scikit-learn carries. A fifth is held out for testing.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import PrivacyEngine
from privet.integrations.accelerate import prepare

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
    """Returns the training digits, and the images and labels of the held-out ones."""
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
    parser.add_argument("--accumulate", type=int, default=1, help="how many batches make a step of the same size")
    parser.add_argument("--save", help="a folder", default=None)
    parser.add_argument("--resume", help="a folder", default=None)
    return parser.parse_args()


def main() -> None:
    """Trains, and shows what it costs, on the main process."""
    options = parsed()
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
    console = Console(quiet=not accelerator.is_main_process)
    torch.manual_seed(0)  # of the weights alone: batches and noise come from the operating system
    train, images, labels = digits()
    model, engine = network(), PrivacyEngine()
    model, optimizer, loader = prepare(
        accelerator,
        engine,
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.4, momentum=0.9),
        data_loader=DataLoader(train, batch_size=BATCH_SIZE // accelerator.num_processes // options.accumulate),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=options.epochs,
        max_grad_norm=CLIP_NORM,
    )
    if options.resume is not None:
        accelerator.load_state(options.resume)
    console.print(engine)
    first = loader.loader.passes_begun
    for _ in track(range(first, options.epochs), description="training", console=console):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        if options.save is not None:
            accelerator.save_state(options.save)

    model.eval()
    with torch.no_grad():
        guesses = model(images.to(accelerator.device)).argmax(1).cpu()
    accuracy = float((guesses == labels).double().mean())
    console.print(f"accuracy {accuracy:.1%} on held-out digits at ε = {engine.get_epsilon(DELTA):.2f}, δ = {DELTA:g}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
