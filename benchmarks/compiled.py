"""When does compiling pay? Compiled private steps beside compiled steps without privacy, compile time included.

    python -m benchmarks.compiled --out benchmarks/results             every cell, then the table (up to an hour)
    python -m benchmarks.compiled --network mnist --way compiled --steps 100 --seconds 60      one cell, as JSON

This is the question of Fig. 4 of Yousefpour et al. 2021 ("Opacus"): the time of a whole run over 1, 10, 100 and 1000
steps of one fixed batch, from the first step on. A run that was cut short goes on where it was; with `--again` it
starts anew. Every cell runs in a process of its own with an empty compiler cache. Where 1000 steps do not fit into
`--seconds`, the rest is the median of those that did, and the total is marked with ~. Each total is also given as a
multiple of the compiled run without privacy over as many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import NETWORKS, Batch
from benchmarks.spine import machine
from benchmarks.spine_cell import LEARNING_RATE, Step, plain

__all__ = ["TOTALS", "WAYS"]

BATCHES = {"mnist": 64, "cifar": 64, "embedding": 64, "transformer": 16, "resnet": 16}
TOTALS = (1, 10, 100, 1000)
SEED = 0


def plain_compiled(model: nn.Module, batch: Batch) -> Step:
    """Returns a step without privacy, forward and backward compiled."""
    optimizer, (inputs, targets) = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), batch
    loss = torch.compile(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True, dynamic=False)

    def step() -> None:
        optimizer.zero_grad()
        loss(inputs, targets).backward()
        optimizer.step()

    return step


def private(*, compiled: bool) -> Callable[[nn.Module, Batch], Step]:
    """Returns a maker of steps through the explicit door."""

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
            performance=Performance(physical_batch_size=len(batch[1]), compile=compiled),
        )
        return lambda: step(batch)

    return make


WAYS: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "not private": plain,
    "not private, compiled": plain_compiled,
    "private": private(compiled=False),
    "compiled": private(compiled=True),
}
BASE = "not private, compiled"


def measured(network: str, way: str, *, steps: int, seconds: float) -> dict[str, object]:
    """Returns the seconds of the first step, the median of the later ones, and the totals."""
    torch.manual_seed(SEED)
    batch = NETWORKS[network].batch(BATCHES[network])
    torch.manual_seed(SEED)
    step = WAYS[way](NETWORKS[network].build(), batch)
    times: list[float] = []
    while len(times) < 3 or (len(times) < steps and sum(times[1:]) < seconds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    later = statistics.median(times[1:])
    totals = {n: sum(times[:n]) + max(0, n - len(times)) * later for n in TOTALS}
    return {"first_s": times[0], "step_s": later, "steps": len(times), "total_s": totals}


def run(network: str, way: str, *, steps: int, seconds: float) -> dict[str, object]:
    """Returns one cell, measured in a process of its own with an empty compiler cache."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--network", network, "--way", way]
    command += ["--steps", str(steps), "--seconds", str(seconds)]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return {"network": network, "batch": BATCHES[network], "way": way, **json.loads(done.stdout)}


def table(rows: list[dict[str, object]]) -> str:
    """Returns the rows as a Markdown table."""
    base = {r["network"]: r["total_s"] for r in rows if r["way"] == BASE}
    head = "".join(f" {n} steps, s | x |" for n in TOTALS)
    lines = [f"| network | batch | way | first step, s | later steps, ms |{head}", "|---" * (5 + 2 * len(TOTALS)) + "|"]
    for r in rows:
        totals, beside = r["total_s"], base[r["network"]]
        assert isinstance(totals, dict)
        assert isinstance(beside, dict)
        cells = ""
        for n in TOTALS:
            mark = "~" if n > int(str(r["steps"])) else ""
            cells += f" {mark}{totals[str(n)]:.3g} | {totals[str(n)] / beside[str(n)]:.2f} |"
        first, later = float(str(r["first_s"])), 1e3 * float(str(r["step_s"]))
        lines.append(f"| {r['network']} | {r['batch']} | {r['way']} | {first:.3g} | {later:.3g} |{cells}")
    return "\n".join(lines) + "\n"


def report(about: dict[str, Any], rows: list[dict[str, object]]) -> str:
    """Returns the page."""
    return f"""# When compiling pays

{about["date"]}; {about["processor"]}, {about["cores"]} cores, one thread; Python {about["python"]}, \
torch {about["versions"]["torch"]}. Written by `python -m benchmarks.compiled`; do not edit.

Seconds of a whole run from its first step on, compilation and the check of the first batch included, and the same as a
multiple (`x`) of *{BASE}* over as many steps. `~`: not all of the later steps were taken; they are
counted at the median of those that were.

{table(rows)}"""


def all_cells(out: Path, *, steps: int, seconds: float, again: bool) -> None:
    """Measures what is not in the file yet, and writes file and page after each network."""
    held = out / "compiled.json"
    rows = [] if again or not held.exists() else json.loads(held.read_text(encoding="utf-8"))["rows"]
    for network in BATCHES:
        if any(row["network"] == network for row in rows):
            continue
        for way in WAYS:
            rows.append(run(network, way, steps=steps, seconds=seconds))
            print(json.dumps(rows[-1]), flush=True)
        about = {**machine(), "threads": 1, "seed": SEED}
        held.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        (out / "compiled.md").write_text(report(about, rows), encoding="utf-8")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for compiled.json and compiled.md")
    parser.add_argument("--again", action="store_true", help="measure what is in that file as well")
    parser.add_argument("--network", choices=BATCHES)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--steps", type=int, default=max(TOTALS))
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to go on after the first step")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    how = {"steps": options.steps, "seconds": options.seconds}
    if options.out is None:
        print(json.dumps(measured(options.network, options.way, **how)))
    else:
        all_cells(options.out, again=options.again, **how)


if __name__ == "__main__":
    main()
