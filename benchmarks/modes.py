"""What does each mode cost in time and memory, beside `"auto"` and beside PyTorch without privacy?

    python -m benchmarks.modes --out benchmarks/results                      every cell, then the tables (half an hour)
    python -m benchmarks.modes --network mnist --batch 64 --mode hooks       one cell, as one line of JSON

A run that was cut short goes on where it was; with `--again` it starts anew. Every cell runs in processes of its own,
one for time and one for memory. Time is the median ratio to the floor of
`benchmarks.spine_cell` (a step without privacy, plus one `torch.randn` over the parameters), steps of both alternating
in one process. Memory is the kernel's high-water mark above what was resident before the first step: of the first two
steps, which hold the check against autograd, and of the steps after them, when freed memory was handed back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import NETWORKS, Batch, Transformer
from benchmarks.spine import machine
from benchmarks.spine_cell import LEARNING_RATE, Step, floor, plain, resident, time_pairs

__all__ = ["CELLS", "MODES"]

SMALL, LARGE = (16, 64), (16, 64, 512)
BATCHES = {"mnist": LARGE, "cifar": LARGE, "embedding": LARGE, "transformer": SMALL, "resnet": SMALL}
SEED = 0
Row = dict[str, Any]


class Checkpointed(nn.Module):
    """The transformer, each block of which is computed again in the backward."""

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:  # (B, T)
        """Returns the logits (B, 2)."""
        net = self.inner
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        h = net.tokens(ids) + net.positions(positions)
        for block in net.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        logits: Tensor = net.head(net.norm(h).mean(1))
        return logits


def engine(mode: str) -> Callable[[nn.Module, Batch], Step]:
    """Returns a maker of steps through the paper's door, in a mode."""

    def make(model: nn.Module, batch: Batch) -> Step:
        from privet import PrivacyEngine

        inputs, targets = batch
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode=mode,
        )

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        return step

    return make


def explicit(passes: int) -> Callable[[nn.Module, Batch], Step]:
    """Returns a maker of steps through the explicit door, in one or two passes."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def make(model: nn.Module, batch: Batch) -> Step:
        from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivateStep

        step = PrivateStep(
            model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            mechanism=Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=1_000_000),
            loss_per_example=loss,
            expected_batch_size=len(batch[1]),
            performance=Performance(passes=passes),  # type: ignore[arg-type]
        )
        return lambda: step(batch)

    return make


MODES: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "not private": plain,
    "auto": engine("auto"),
    "hooks": engine("hooks"),
    "functorch": engine("functorch"),
    "passes=1": explicit(1),
    "passes=2": explicit(2),
}
CHECKPOINTED = ("not private", "passes=1", "passes=2")
CELLS: list[Row] = [
    {"network": network, "batch": batch, "mode": mode, "checkpointed": False}
    for network, batches in BATCHES.items()
    for batch in batches
    for mode in MODES
]
CELLS += [{"network": "transformer", "batch": 64, "mode": mode, "checkpointed": True} for mode in CHECKPOINTED]


def trimmed() -> None:
    """Hands freed memory back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peaks(step: Step) -> dict[str, float]:
    """Returns the MiB at the height of the first two steps, and of three after them."""
    trimmed()
    before, found = resident("VmRSS"), {}
    for name, steps in (("first_mib", 2), ("mib", 3)):
        trimmed()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        for _ in range(steps):
            step()
        found[name] = (resident("VmHWM") - before) / 2**20
    return found


def measured(cell: Row, *, memory: bool, seconds: float) -> Row:
    """Returns one measurement."""
    torch.manual_seed(SEED)
    network = NETWORKS[cell["network"]]
    batch = network.batch(cell["batch"])

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        built = network.build()
        return Checkpointed(built) if cell["checkpointed"] and isinstance(built, Transformer) else built

    step = MODES[cell["mode"]](model(), batch)
    if memory:
        return dict(peaks(step))
    torch.manual_seed(SEED)
    return dict(time_pairs(floor(network.build(), batch), step, seconds=seconds))


def run(cell: Row, *, seconds: float, threads: int) -> Row:
    """Returns both measurements of one cell, each from a process of its own."""
    row = dict(cell)
    for memory in ([], ["--memory"]):
        command = [sys.executable, "-m", "benchmarks.modes", "--seconds", str(seconds), "--threads", str(threads)]
        command += [f"--{name}={cell[name]}" for name in ("network", "batch", "mode")]
        command += [*memory, *(["--checkpointed"] if cell["checkpointed"] else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row.update(json.loads(done.stdout.splitlines()[-1]))
    return row


def table(rows: list[Row], shown: Callable[[Row, Row], str]) -> str:
    """Returns a table of networks and modes; `shown` says a cell, given it and its network's without privacy."""
    found: dict[tuple[str, int, bool], dict[str, Row]] = {}
    for r in rows:
        found.setdefault((r["network"], r["batch"], r["checkpointed"]), {})[r["mode"]] = r
    lines = [f"| network | batch | {' | '.join(MODES)} |", "|---" * (2 + len(MODES)) + "|"]
    for (network, batch, checkpointed), modes in found.items():
        cells = [shown(modes[mode], modes["not private"]) if mode in modes else "-" for mode in MODES]
        lines.append(f"| {network}{', checkpointed' if checkpointed else ''} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(about: Row, rows: list[Row]) -> str:
    """Returns the page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "opacus")
    with_quartiles = "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})"
    return f"""# What each mode costs

{about["date"]}; {about["processor"]}, {about["cores"]} cores, {about["memory_gib"]} GiB; {about["threads"]} threads; \
Python {about["python"]}, {versions}. Written by `python -m benchmarks.modes`; do not edit.

## Time

Median ratios to the *floor*, with quartiles: a step without privacy plus one `torch.randn` over the parameters, never
checkpointed; steps of both alternate in one process.

{table(rows, lambda row, _: with_quartiles.format(**row))}
## Memory

MiB at the peak of later steps above what was resident before the first, and in brackets as a multiple of *not private*.
Each in a process of its own.

{table(rows, lambda row, base: f"{row['mib']:.0f} ({row['mib'] / max(base['mib'], 1.0):.1f})")}
## Memory of the first steps

MiB at the peak of the first two steps, which hold the check against autograd.

{table(rows, lambda row, _: f"{row['first_mib']:.0f}")}"""


def all_cells(out: Path, *, seconds: float, threads: int, again: bool) -> None:
    """Measures what is not in the file yet, and writes file and page after each cell."""
    held, page = out / "modes.json", out / "modes.md"
    rows: list[Row] = [] if again or not held.exists() else json.loads(held.read_text(encoding="utf-8"))["rows"]
    for cell in CELLS:
        if any(all(row.get(name) == value for name, value in cell.items()) for row in rows):
            continue
        rows.append(run(cell, seconds=seconds, threads=threads))
        print(json.dumps(rows[-1]), flush=True)
        about = {**machine(), "threads": threads, "seed": SEED}
        held.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        page.write_text(report(about, rows), encoding="utf-8")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for modes.json and modes.md")
    parser.add_argument("--again", action="store_true", help="measure what is in that file as well")
    parser.add_argument("--network", choices=BATCHES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--checkpointed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to time pairs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.out is None:
        cell = {name: getattr(options, name) for name in ("network", "batch", "mode", "checkpointed")}
        print(json.dumps(measured(cell, memory=options.memory, seconds=options.seconds)))
    else:
        all_cells(options.out, seconds=options.seconds, threads=options.threads, again=options.again)


if __name__ == "__main__":
    main()
