"""What other noise costs in a step, in time and in memory, beside independent Gaussian noise.

    python -m benchmarks.correlated --out benchmarks/results            # some minutes

Two things are timed: one release of a clipped sum, which is noise for every element and nothing of the model, and a
whole step of a small network with the same parameters. Each noise takes turns with Gaussian noise in the same process,
so that a busy machine slows both; the figure is the median of the ratios of such pairs. Buffers are full before the
first pair. Memory is that of the buffers kept between steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.spine import machine
from privet import Flat, Mechanism, Partition, PrivateStep
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import (
    BandMF,
    DiscreteGaussian,
    Gaussian,
    Noise,
    NoiseKey,
    NoiseMechanism,
    SecureNoise,
    optimized_bands,
    optimized_decay,
    optimized_decays,
)

SHAPES = {"embedding": (4000, 128), "in": (512, 512), "out": (512, 512), "bias": (512,)}
STEPS, WARM, SEED = 1024, 64, 7
BANDS, DECAYS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 5)
BATCH, TOKENS = 256, 4


def noises() -> dict[str, tuple[Noise, float | None]]:
    """Returns every noise by name, with its loss over a run of `STEPS` steps and one participation."""
    found: dict[str, tuple[Noise, float | None]] = {}
    for bands in BANDS:
        best = optimized_bands(bands, steps=STEPS)
        found[f"BandMF, {bands} bands"] = best.noise, best.loss
    for count in DECAYS:
        decaying = optimized_decays(count, steps=STEPS)
        found[f"BLT, {count} decays"] = decaying.noise, decaying.loss
    single = optimized_decay(steps=STEPS)
    found["LambdaCGD"] = single.noise, single.loss
    found["DiscreteGaussian"] = DiscreteGaussian(1.0), None
    again = BandMF(1.0, optimized_bands(4, steps=STEPS).noise.coefficients, most_bytes=0)
    found[f"BandMF, 4 bands, drawn again, step {WARM}"] = again, None
    return found


def mechanism_of(noise: Noise) -> NoiseMechanism:
    """Returns the mechanism of one run, reproducible so that two runs of this file draw alike."""
    return noise.mechanism(SecureNoise(NoiseKey.from_generator(torch.Generator().manual_seed(SEED))))


def seconds(mechanism: NoiseMechanism, step: int) -> float:
    """Returns how long one release takes."""
    sums = ClippedSum({name: torch.zeros(shape) for name, shape in SHAPES.items()}, 1.0)
    begun = time.perf_counter()
    mechanism.release(sums, multiplier=1.0, step=step)
    return time.perf_counter() - begun


class Ids(Dataset[tuple[Tensor]]):
    """Rows of made-up words, in batches that never end."""

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (torch.arange(index, index + TOKENS) % SHAPES["embedding"][0],)


def stepping(noise: Noise) -> Callable[[], float]:
    """Returns a function that takes a whole step with this noise, and returns how long it took."""
    width = SHAPES["in"][0]
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Embedding(*SHAPES["embedding"]), nn.Flatten(), nn.Linear(width, width, bias=False), nn.Tanh(),
        nn.Linear(width, width),
    )  # fmt: skip
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(
            sampling=Partition(batch_size=BATCH, dataset_size=BATCH * STEPS), clipping=Flat(1.0), noise=noise
        ),
        loss_per_example=lambda model, batch: model(batch[0]).square().mean(1),
    )
    batches = iter(step.batches(Ids()))

    def taken() -> float:
        batch = next(batches)
        begun = time.perf_counter()
        step(batch)
        return time.perf_counter() - begun

    return taken


def whole_step(noise: Noise, rounds: int) -> dict[str, Any]:
    """Returns the ratio of a whole step to one with Gaussian noise."""
    ours, gaussian = stepping(noise), stepping(Gaussian(1.0))
    for _ in range(max(3, len(getattr(noise, "coefficients", ())))):
        ours()
    for _ in range(3):
        gaussian()
    pairs = [(gaussian(), ours()) for _ in range(rounds)]
    ratios = [mine / other for other, mine in pairs]
    return {
        "step over Gaussian": round(statistics.median(ratios), 3),
        "step, quartiles": [round(each, 3) for each in statistics.quantiles(ratios, n=4)[::2]],
        "step with Gaussian, ms": round(1e3 * statistics.median(other for other, _ in pairs), 1),
    }


def measured(noise: Noise, loss: float | None, rounds: int) -> dict[str, Any]:
    """Returns the ratio to Gaussian noise, and the buffers."""
    correlated, independent = mechanism_of(noise), mechanism_of(Gaussian(1.0))
    small = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    drawn_again = isinstance(noise, BandMF) and noise.most_bytes == 0
    first = WARM if drawn_again else max(2, len(getattr(noise, "coefficients", ())))
    rounds = min(rounds, 3) if drawn_again else rounds
    if drawn_again:  # its cost grows with the steps, and the first ones are not needed for it
        correlated.release(ClippedSum(small, 1.0), multiplier=1.0, step=0)
        for step in range(1, first):
            correlated.release(ClippedSum({"bias": torch.zeros(8)}, 1.0), multiplier=1.0, step=step)
    else:
        for step in range(first):
            seconds(correlated, step)
    ratios, own = [], []
    for index in range(rounds):
        step = first + index
        times = [seconds(independent, step), seconds(correlated, step)]
        ratios.append(times[1] / times[0])
        own.append(times[0])
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    buffers = getattr(getattr(correlated, "source", None), "buffers", 0)
    return {
        "time over Gaussian": round(statistics.median(ratios), 3),
        "quartiles": [round(each, 3) for each in statistics.quantiles(ratios, n=4)[::2]],
        "buffers": buffers,
        "bytes per parameter": 4 * buffers,
        "Gaussian, ns per element": round(1e9 * statistics.median(own) / elements, 2),
        "loss": None if loss is None else round(loss, 4),
        **({} if drawn_again else whole_step(noise, rounds)),
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    where = results["where"]
    timed = [
        each["step with Gaussian, ms"] for each in results["measured"].values() if "step with Gaussian, ms" in each
    ]
    ordinary = statistics.median(timed)
    about = (
        f"{where['date']}, {where['processor']}, {where['threads']} thread(s), torch {where['torch']}, Python "
        f"{where['python']}, seed {where['seed']}. One release of {where['elements']:,} float32 elements, noise from "
        f"AES on the host; the median of {where['rounds']} pairs with Gaussian noise, quartiles in brackets. A step "
        f"is of an embedding and two linear layers with as many parameters, at a batch of {BATCH} (it takes "
        f"{ordinary:.0f} ms with Gaussian noise). Other programs shared the machine."
    )
    loss = (
        f"The loss is sens(C) x root mean square error of prefix sums over {STEPS} steps, one participation; "
        "independent noise has 22.64."
    )
    head = "| noise | release over Gaussian | step over Gaussian | buffers | bytes a parameter | loss |"
    lines = ["# What other noise costs in a step", "", about, "", loss, "", head, "|---|---|---|---|---|---|"]
    for name, found in results["measured"].items():
        low, high = found["quartiles"]
        own = "" if found["loss"] is None else f"{found['loss']:.3f}"
        step = ""
        if "step over Gaussian" in found:
            least, most = found["step, quartiles"]
            step = f"{found['step over Gaussian']:.2f} ({least:.2f}, {most:.2f})"
        lines.append(
            f"| {name} | {found['time over Gaussian']:.2f} ({low:.2f}, {high:.2f}) | {step} | {found['buffers']} | "
            f"{found['bytes per parameter']} | {own} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "where": {
            **machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seed": SEED,
            "rounds": options.rounds,
            "elements": sum(torch.Size(shape).numel() for shape in SHAPES.values()),
        },
        "measured": {name: measured(noise, loss, options.rounds) for name, (noise, loss) in noises().items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "correlated.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "correlated.md").write_text(table(results))


if __name__ == "__main__":
    main()
