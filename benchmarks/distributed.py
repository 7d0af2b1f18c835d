"""What do several ranks cost? Private steps on one process and on two, beside DistributedDataParallel without privacy.

    python -m benchmarks.distributed --out benchmarks/results            every network, then the table
    python -m benchmarks.distributed --networks mnist --seconds 2        a few steps, on the screen

Each rank has a fixed batch of its own, of the same size for any number of ranks, on one thread. In each block of a few
steps every way takes its turn, so that what else the machine does meets all of them alike. A cell is the median of the
blocks, of rank 0. Bytes are those that the loopback interface sent during the blocks, of all ranks: run it alone.

The question is whether privacy costs more on several ranks than on one: the last column is private / plain on two ranks
over private / plain on one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.networks import NETWORKS, Batch
from benchmarks.spine import machine
from benchmarks.spine_cell import LEARNING_RATE, Step, plain

__all__ = ["BATCHES", "WAYS"]

BATCHES = {"mnist": 64, "embedding": 64, "cifar": 32, "transformer": 8}
RANKS = (1, 2)
BLOCK = 4
SEED = 0
_LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def wrapped(model: nn.Module) -> nn.Module:
    """Returns the model, in DistributedDataParallel if there are several ranks."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def not_private(model: nn.Module, batch: Batch) -> Step:
    """Returns a step without privacy."""
    return plain(wrapped(model), batch)


def explicit(model: nn.Module, batch: Batch) -> Step:
    """Returns a private step through the explicit door."""
    from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    held = wrapped(model)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    step = PrivateStep(
        held,
        optimizer=torch.optim.SGD(held.parameters(), lr=LEARNING_RATE),
        mechanism=Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=1_000_000),
        loss_per_example=loss,
        expected_batch_size=ranks * len(batch[1]),
    )
    return lambda: step(batch)


WAYS: dict[str, Callable[[nn.Module, Batch], Step]] = {"plain": not_private, "private": explicit}


def sent() -> int:
    """Returns the bytes that the loopback interface has sent so far."""
    return int(_LOOPBACK.read_text(encoding="ascii")) if _LOOPBACK.exists() else 0


def measured(network: str, *, seconds: float) -> dict[str, dict[str, float]]:
    """Returns for each way the median seconds of a step on this rank, and the bytes a step that all ranks sent."""
    several = dist.is_initialized()
    steps = {}
    for name, make in WAYS.items():
        torch.manual_seed(SEED)
        steps[name] = make(NETWORKS[network].build(), NETWORKS[network].batch(BATCHES[network]))
        for _ in range(3):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    moved = dict.fromkeys(WAYS, 0)
    begun, again = time.perf_counter(), torch.ones(1)
    while again.item():
        for name, step in steps.items():
            if several:
                dist.barrier()
            before, start = sent(), time.perf_counter()
            for _ in range(BLOCK):
                step()
            times[name].append((time.perf_counter() - start) / BLOCK)
            if several:
                dist.barrier()
            moved[name] += sent() - before
        again.fill_(float(time.perf_counter() - begun < seconds or len(times["plain"]) < 5))
        if several:  # rank 0 decides for all
            dist.broadcast(again, 0)
    return {
        name: {"step_s": statistics.median(found), "bytes": moved[name] / len(found) / BLOCK, "blocks": len(found)}
        for name, found in times.items()
    }


def on_rank(rank: int, ranks: int, folder: str, network: str, seconds: float) -> None:
    """Measures on one rank, and writes what rank 0 found."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        where = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    found = measured(network, seconds=seconds)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def cell(network: str, ranks: int, *, seconds: float) -> dict[str, Any]:
    """Returns one row: both ways on so many ranks, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(on_rank, args=(ranks, folder, network, seconds), nprocs=ranks)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in NETWORKS[network].build().parameters())
    return {"network": network, "batch": BATCHES[network], "parameters": parameters, "ranks": ranks, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| network | parameters | batch | ranks | plain, ms | private, ms | x | plain, B | private, B | growth |",
        "|---" * 10 + "|",
    ]
    alone: dict[str, float] = {}
    for row in rows:
        plainly, privately = row["plain"], row["private"]
        ratio = privately["step_s"] / plainly["step_s"]
        base = alone.setdefault(row["network"], ratio)
        lines.append(
            f"| {row['network']} | {row['parameters']:,} | {row['batch']} | {row['ranks']} | "
            f"{1e3 * plainly['step_s']:.3g} | {1e3 * privately['step_s']:.3g} | {ratio:.2f} | "
            f"{plainly['bytes']:,.0f} | {privately['bytes']:,.0f} | {ratio / base:.2f} |"
        )
    return "\n".join(lines) + "\n"


def report(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Returns the page."""
    return f"""# What several ranks cost

{about["date"]}; {about["processor"]}, {about["cores"]} cores, one thread a rank, gloo; Python {about["python"]}, \
torch {about["versions"]["torch"]}. Written by `python -m benchmarks.distributed`; do not edit.

Milliseconds of a step on rank 0, and bytes a step that all ranks together sent over the loopback interface. *Plain* is
DistributedDataParallel without privacy, or one process. *Batch* is of each rank. *x* is private / plain,
and *growth* is x over x on one rank: what ranks add to the price of privacy. {about["note"]}

{table(rows)}"""


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for distributed.json and distributed.md")
    parser.add_argument("--networks", nargs="*", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to measure each row")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else the machine did")
    options = parser.parse_args()
    rows = []
    for network in options.networks:
        for ranks in RANKS:
            rows.append(cell(network, ranks, seconds=options.seconds))
            print(json.dumps(rows[-1]), flush=True)
    about = {**machine(), "seed": SEED, "note": options.note}
    if options.out is None:
        print(table(rows))
        return
    (options.out / "distributed.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    (options.out / "distributed.md").write_text(report(about, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
