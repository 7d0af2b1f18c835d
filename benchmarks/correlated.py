"""What correlated noise costs in a step, in time and in memory, beside independent Gaussian noise.

    python -m benchmarks.correlated --out benchmarks/results            # a minute or two

One release of a clipped sum is timed: noise for every element, and nothing of the model. Each correlated noise takes
turns with Gaussian noise in the same process, so that a busy machine slows both; the figure is the median of the ratios
of such pairs. Buffers are full before the first pair. Memory is that of the buffers kept between steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.spine import machine
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import (
    BandMF,
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
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    where = results["where"]
    about = (
        f"{where['date']}, {where['processor']}, {where['threads']} thread(s), torch {where['torch']}, Python "
        f"{where['python']}, seed {where['seed']}. One release of {where['elements']:,} float32 elements, noise from "
        f"AES on the host; the median of {where['rounds']} pairs with Gaussian noise, the quartiles in brackets. Other "
        "programs shared the machine."
    )
    loss = (
        f"The loss is sens(C) x root mean square error of prefix sums over {STEPS} steps, one participation; "
        "independent noise has 22.64."
    )
    head = "| noise | time over Gaussian | buffers | bytes a parameter | loss |"
    lines = ["# What correlated noise costs in a step", "", about, "", loss, "", head, "|---|---|---|---|---|"]
    for name, found in results["measured"].items():
        low, high = found["quartiles"]
        own = "" if found["loss"] is None else f"{found['loss']:.3f}"
        lines.append(
            f"| {name} | {found['time over Gaussian']:.2f} ({low:.2f}, {high:.2f}) | {found['buffers']} | "
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
