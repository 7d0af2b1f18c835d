"""What does each mode cost in time and memory, beside `"auto"` and beside PyTorch without privacy?

    python -m benchmarks.modes --out benchmarks/results              every cell, then the table (about ten minutes)
    python -m benchmarks.modes --network mnist --mode hooks          one cell, as one line of JSON

Every cell runs in processes of its own, one for time and one for memory. Time is the median ratio to the floor of
`benchmarks.spine_cell` (a step without privacy, plus one `torch.randn` over the parameters), steps of both alternating
in one process. Memory is the kernel's high-water mark above what was resident before the first step: of the first two
steps, which hold the check against autograd, and of the steps after them, when freed memory was handed back.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import NETWORKS, Batch, Transformer
from benchmarks.spine_cell import LEARNING_RATE, Step, floor, plain, resident, time_pairs

__all__ = ["CELLS", "MODES"]

BATCHES = {"mnist": 64, "cifar": 64, "embedding": 64, "transformer": 32}
SEED = 0


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
        from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

        step = PrivateStep(
            model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            mechanism=Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=1_000_000),
            loss_per_example=loss,
            expected_batch_size=len(batch[1]),
            passes=passes,  # type: ignore[arg-type]
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
CELLS = [(network, mode, False) for network in BATCHES for mode in MODES]
CELLS += [("transformer", mode, True) for mode in CHECKPOINTED]


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


def measured(network: str, mode: str, *, checkpointed: bool, memory: bool, seconds: float) -> dict[str, float | int]:
    """Returns one measurement."""
    torch.manual_seed(SEED)
    batch = NETWORKS[network].batch(BATCHES[network])

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        built = NETWORKS[network].build()
        return Checkpointed(built) if checkpointed and isinstance(built, Transformer) else built

    step = MODES[mode](model(), batch)
    if memory:
        return dict(peaks(step))
    torch.manual_seed(SEED)
    reference = floor(NETWORKS[network].build(), batch)
    return time_pairs(reference, step, seconds=seconds)


def run(network: str, mode: str, *, checkpointed: bool, seconds: float) -> dict[str, object]:
    """Returns both measurements of one cell, each from a process of its own."""
    row: dict[str, object] = {"network": network, "batch": BATCHES[network], "mode": mode, "checkpointed": checkpointed}
    for memory in ([], ["--memory"]):
        command = [sys.executable, "-m", "benchmarks.modes", "--network", network, "--mode", mode, *memory]
        command += ["--seconds", str(seconds), *(["--checkpointed"] if checkpointed else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row.update(json.loads(done.stdout))
    return row


def table(rows: list[dict[str, object]]) -> str:
    """Returns the rows as a Markdown table, memory also as a ratio to what training without privacy needs."""
    base = {(r["network"], r["checkpointed"]): float(str(r["mib"])) for r in rows if r["mode"] == "not private"}
    lines = [
        "| network | batch | mode | time | MiB | of not private | MiB, first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = f"{r['network']}, checkpointed" if r["checkpointed"] else str(r["network"])
        mib, first = float(str(r["mib"])), float(str(r["first_mib"]))
        share = mib / max(base[r["network"], r["checkpointed"]], 1.0)
        quartiles = [f"{float(str(r[key])):.2f}" for key in ("ratio", "ratio_low", "ratio_high") if key in r]
        time = "{} ({}-{})".format(*quartiles) if quartiles else "not timed"
        lines.append(f"| {name} | {r['batch']} | {r['mode']} | {time} | {mib:.0f} | {share:.2f} | {first:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for modes.json and modes.md")
    parser.add_argument("--network", choices=BATCHES)
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--checkpointed", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to time pairs")
    parser.add_argument("--date", default="")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.out is None:
        how = {"checkpointed": options.checkpointed, "memory": options.memory, "seconds": options.seconds}
        print(json.dumps(measured(options.network, options.mode, **how)))
        return
    rows = []
    for network, mode, checkpointed in CELLS:
        rows.append(run(network, mode, checkpointed=checkpointed, seconds=options.seconds))
        print(json.dumps(rows[-1]), flush=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    about = {
        "date": options.date,
        "hardware": "2 cores, CPU",
        "threads": 1,
        "versions": versions,
        "seed": SEED,
        "note": options.note,
    }
    (options.out / "modes.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    where = f"{options.date}; 2 cores, CPU, one thread; Python {versions['python']}, torch {versions['torch']}."
    head = f"# What each mode costs\n\n{where}\n{options.note}\n\n"
    explained = (
        "`time` is the median ratio to the floor, with quartiles: a step without privacy plus one `torch.randn` over\n"
        "the parameters, never checkpointed. `MiB` is the peak of later steps above what was resident before the\n"
        "first; *first step* that of the first two, which hold the check against autograd.\n\n"
    )
    (options.out / "modes.md").write_text(head + explained + table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
