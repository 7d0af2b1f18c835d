"""What do several ranks cost? Private steps on one process and on two, beside the same steps without privacy.

    python -m benchmarks.distributed --out benchmarks/results            every network, the table and the figure
    python -m benchmarks.distributed --networks mnist --seconds 2        a few steps, on the screen

On two ranks a network is laid out in three ways: whole on each (DistributedDataParallel), in parts that are gathered
(fully_shard), and, for the transformer, computed in parts (a tensor parallel plan). Each rank has a fixed batch, of the
same size for any number of ranks, on one thread. In each block of a few steps every layout takes its turn with privacy
and without, so that what else the machine does meets all of them alike. A cell is the median of the blocks, of rank 0;
x is the median of the blocks' ratios. Bytes are those that the loopback interface sent during the blocks, of all ranks:
run it alone.

The question is whether privacy costs more on several ranks than on one: the last column is private / plain on two ranks
over private / plain on one.
"""

from __future__ import annotations

import argparse
import json
import os
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.networks import NETWORKS, Batch, Transformer
from benchmarks.spine import machine
from benchmarks.spine_cell import LEARNING_RATE, Step, plain

__all__ = ["BATCHES", "LAYOUTS", "WAYS"]

Row = dict[str, Any]

BATCHES = {"mnist": 64, "embedding": 64, "cifar": 32, "transformer": 8}
RANKS = (1, 2)
LEAST = 5  # blocks of each way
WARM = 8  # steps before the first block: private steps check their first batch and their eighth
SEED = 0
_LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def as_it_is(model: nn.Module) -> nn.Module:
    """Returns the model."""
    return model


def sharded(model: nn.Module) -> nn.Module:
    """Returns the model with each of its parts, and then the rest, fully sharded."""
    parts = model.blocks if isinstance(model, Transformer) else model
    for part in parts.children():
        if next(part.parameters(), None) is not None:
            fully_shard(part)
    fully_shard(model)
    return model


def computed_in_parts(model: nn.Module) -> nn.Module:
    """Returns the transformer, attention by heads and the layers after it by features, over all ranks."""
    assert isinstance(model, Transformer)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = ("query", "key", "value", "up"), ("out", "down")
    for block in model.blocks:
        plan = {**{name: ColwiseParallel() for name in columns}, **{name: RowwiseParallel() for name in rows}}
        parallelize_module(block, mesh, plan)
        block.heads //= dist.get_world_size()
    parallelize_module(model, mesh, {"tokens": RowwiseParallel(input_layouts=Replicate())})
    return model


Layout = Callable[[nn.Module], nn.Module]
LAYOUTS: dict[str, Layout] = {
    "one process": as_it_is,
    "DistributedDataParallel": DistributedDataParallel,
    "fully_shard": sharded,
    "tensor parallel": computed_in_parts,
}


def layouts_of(network: str, ranks: int) -> list[str]:
    """Returns the layouts of a network on so many ranks."""
    if ranks == 1:
        return ["one process"]
    several = [name for name in LAYOUTS if name != "one process"]
    return several if network == "transformer" else several[:-1]


def not_private(model: nn.Module, batch: Batch) -> Step:
    """Returns a step without privacy."""
    return plain(model, batch)


def explicit(model: nn.Module, batch: Batch) -> Step:
    """Returns a private step through the explicit door."""
    from privet import Flat, Gaussian, Mechanism, Poisson, PrivateStep

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        mechanism=Mechanism(sampling=Poisson(0.01), clipping=Flat(1.0), noise=Gaussian(1.0), steps=1_000_000),
        loss_per_example=loss,
        expected_batch_size=ranks * len(batch[1]),
    )
    return lambda: step(batch)


WAYS: dict[str, Callable[[nn.Module, Batch], Step]] = {"plain": not_private, "private": explicit}


def sent() -> int:
    """Returns the bytes that the loopback interface has sent so far."""
    return int(_LOOPBACK.read_text(encoding="ascii")) if _LOOPBACK.exists() else 0


def measured(network: str, *, seconds: float, block: int) -> list[Row]:
    """Returns for each layout what a step of each way takes on this rank, and the bytes that all ranks sent for it."""
    several = dist.is_initialized()
    layouts = layouts_of(network, dist.get_world_size() if several else 1)
    steps: dict[tuple[str, str], Step] = {}
    for layout in layouts:
        for way, make in WAYS.items():
            torch.manual_seed(SEED)
            batch = NETWORKS[network].batch(BATCHES[network])
            steps[layout, way] = make(LAYOUTS[layout](NETWORKS[network].build()), batch)
            for _ in range(WARM):
                steps[layout, way]()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    moved = dict.fromkeys(steps, 0)
    begun, again = time.perf_counter(), torch.ones(1)
    while again.item():
        for key, step in steps.items():
            if several:
                dist.barrier()
            before, start = sent(), time.perf_counter()
            for _ in range(block):
                step()
            times[key].append((time.perf_counter() - start) / block)
            if several:
                dist.barrier()
            moved[key] += sent() - before
        blocks = len(next(iter(times.values())))
        again.fill_(float(time.perf_counter() - begun < seconds * len(layouts) or blocks < LEAST))
        if several:  # rank 0 decides for all
            dist.broadcast(again, 0)
    return [
        {
            "layout": layout,
            "ratio": statistics.median(
                private / bare for private, bare in zip(times[layout, "private"], times[layout, "plain"], strict=True)
            ),
            "blocks": blocks,
            "steps": block,
            **{
                way: {"step_s": statistics.median(times[layout, way]), "bytes": moved[layout, way] / blocks / block}
                for way in WAYS
            },
        }
        for layout in layouts
    ]


def on_rank(rank: int, ranks: int, folder: str, network: str, pace: tuple[float, int]) -> None:
    """Measures on one rank, and writes what rank 0 found."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        where = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    found = measured(network, seconds=pace[0], block=pace[1])
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def cells(network: str, ranks: int, *, seconds: float, block: int) -> list[Row]:
    """Returns one row for each layout on so many ranks, measured in the same processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(on_rank, args=(ranks, folder, network, (seconds, block)), nprocs=ranks)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in NETWORKS[network].build().parameters())
    about = {"network": network, "batch": BATCHES[network], "parameters": parameters, "ranks": ranks}
    return [{**about, **row} for row in found]


def growth(row: Row, rows: list[Row]) -> float:
    """Returns private / plain of a row over that of one process."""
    (alone,) = (other["ratio"] for other in rows if other["network"] == row["network"] and other["ranks"] == 1)
    return float(row["ratio"] / alone)


def table(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| network | parameters | batch | layout | plain, ms | private, ms | x | plain, B | private, B | growth |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        plainly, privately = row["plain"], row["private"]
        lines.append(
            f"| {row['network']} | {row['parameters']:,} | {row['batch']} | {row['layout']} | "
            f"{1e3 * plainly['step_s']:.3g} | {1e3 * privately['step_s']:.3g} | {row['ratio']:.2f} | "
            f"{plainly['bytes']:,.0f} | {privately['bytes']:,.0f} | {growth(row, rows):.2f} |"
        )
    return "\n".join(lines) + "\n"


def report(about: dict[str, Any], rows: list[Row]) -> str:
    """Returns the page."""
    return f"""# What several ranks cost

{about["date"]}; {about["processor"]}, {about["cores"]} cores, one thread a rank, gloo; Python {about["python"]}, \
torch {about["versions"]["torch"]}. Load averages of the machine before and after: {about["load"]}. Written by \
`python -m benchmarks.distributed`; do not edit.

Milliseconds of a step on rank 0, and bytes a step that all ranks together sent over the loopback interface. All \
layouts but *one process* are on two ranks. *Plain* is the same layout without privacy. *Batch* is of each rank, and \
of both together for tensor parallel. *x* is private / plain, the median over blocks of a few steps, and *growth* is \
x over x of one process: what ranks add to the price of privacy. {about["note"]}

![private / plain, by layout](distributed.png)

{table(rows)}"""


def draw(rows: list[Row], path: Path) -> None:
    """Draws private / plain of each network by layout, if matplotlib is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed here: no figure")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4))
    width = 0.8 / len(LAYOUTS)
    for place, layout in enumerate(LAYOUTS):
        found = [(networks.index(row["network"]), row["ratio"]) for row in rows if row["layout"] == layout]
        shift = width * (place - (len(LAYOUTS) - 1) / 2)
        bars = axes.bar([x + shift for x, _ in found], [ratio for _, ratio in found], width * 0.92, label=layout)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("time of a private step / plain step")
    axes.set_title("The price of privacy, on one process and on two ranks (gloo, CPU)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for distributed.json, distributed.md and distributed.png")
    parser.add_argument("--networks", nargs="*", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long to measure each row")
    parser.add_argument("--block", type=int, default=3, help="steps of each way before the next one takes its turn")
    parser.add_argument("--note", default="", help="a sentence for the page, such as what else the machine did")
    options = parser.parse_args()
    held = options.out / "distributed.json" if options.out is not None else None
    rows: list[Row] = json.loads(held.read_text("utf-8"))["rows"] if held is not None and held.exists() else []
    rows = [row for row in rows if row["network"] not in options.networks]
    before = os.getloadavg()
    for network in options.networks:
        for ranks in RANKS:
            found = cells(network, ranks, seconds=options.seconds, block=options.block)
            rows += found
            print("\n".join(map(json.dumps, found)), flush=True)
    load = " and ".join(f"{minutes[0]:.1f}" for minutes in (before, os.getloadavg()))
    about = {**machine(), "seed": SEED, "load": load, "note": options.note}
    if options.out is None:
        print(table(rows))
        return
    (options.out / "distributed.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    draw(rows, options.out / "distributed.png")
    (options.out / "distributed.md").write_text(report(about, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
