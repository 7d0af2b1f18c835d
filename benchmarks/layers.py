"""What does privacy cost one layer alone, in time and memory, beside `torch.nn` and beside Opacus?

    python -m benchmarks.layers --out benchmarks/results                     every cell, then table and figure
    python -m benchmarks.layers --out ... --layer linear --batch 64          these cells
    python -m benchmarks.layers --out ... --report                           only table and figure again
    python -m benchmarks.layers --out ... --plot                             only the figure

It is the micro-benchmark of Yousefpour et al. (arXiv 2109.12298, Fig. 3 and 5). A cell is timed in one process, all
contenders by turns (`benchmarks.layer_cell`); memory is taken in a process for each. Cells that the result file has
are not measured again, unless asked for with `--again`; those too large or too slow for the limits are left out, and
listed as such. The figure needs matplotlib; where there is none it is skipped, and `--plot` draws it from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.layer_cell import BATCHES, CONTENDERS, LAYERS
from benchmarks.spine import Row, machine, table

__all__ = ["Measured", "beyond", "report"]

PRIVATE = tuple(name for name in CONTENDERS if name != "torch.nn")
ABOUT = """\
A figure is a factor to `torch.nn` (forward and backward of a mean squared error, zero_grad), the median over turns that
alternate in one process. *privet* does forward, backward and clipped sum, without noise and optimizer; *privet hooks*
and *Opacus* do forward and backward and leave per-example gradients on the parameters, which is what the paper's figure
shows. Memory is the kernel's high-water mark over steps after the first two, above what was resident before; each in
a process of its own. `torch.nn` has its own figures, in milliseconds and MiB; where it needs less than 1 MiB, which
the allocator's own coming and going exceeds, the factor is to 1 MiB. *materialised, predicted* is the memory factor if
exactly `4 B P` bytes are added to what `torch.nn` was measured to need. A dash was not measured; see below."""


class Measured:
    """The measurements so far, by (kind, layer, batch, contender), and the file that they live in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[object, ...], Row] = {}
        self.machine: Row = {}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            self.machine = held["machine"]
            for row in held["rows"]:
                self.rows[self.key(row)] = row

    @staticmethod
    def key(row: Row) -> tuple[object, ...]:
        """Returns what tells one measurement from another."""
        return tuple(row[name] for name in ("kind", "layer", "batch", "contender"))

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps measurements, in the file as well."""
        self.rows.update({self.key(row): row for row in rows})
        self.machine = machine()
        text = json.dumps({"machine": self.machine, "rows": list(self.rows.values())}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")

    def get(self, kind: str, layer: str, batch: int, contender: str, field: str) -> float | None:
        """Returns one figure, or None where there is none."""
        value = self.rows.get((kind, layer, batch, contender), {}).get(field)
        return float(value) if isinstance(value, float | int) else None

    def factor(self, kind: str, layer: str, batch: int, contender: str) -> float | None:
        """Returns a factor to `torch.nn`, or None."""
        if kind == "time":
            return self.get(kind, layer, batch, contender, "factor")
        mine, base = (self.get(kind, layer, batch, name, "mib") for name in (contender, "torch.nn"))
        return None if mine is None or base is None else mine / max(base, 1.0)


def beyond(layer: str, batch: int, contender: str, *, gib: float, gflop: float) -> str | None:
    """Returns why a cell is not measured, by counting beforehand, or None."""
    described = LAYERS[layer]
    if (work := described.flop * batch / 1e9) > gflop:
        return f"a step without privacy is {work:.0f} GFLOP, the limit is {gflop:g}"
    if (need := described.bytes(batch, contender=contender) / 2**30) > gib:
        return f"needs about {need:.1f} GiB, the limit is {gib:g}"
    return None


def cell(layer: str, batch: int, contenders: Sequence[str], options: argparse.Namespace, *, memory: bool) -> Row:
    """Returns what one process printed."""
    command = [sys.executable, "-m", "benchmarks.layer_cell", "--layer", layer, "--batch", str(batch)]
    for name in contenders:
        command += ["--contender", name]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    command += ["--limit-gib", str(options.limit_gib), *(["--memory"] if memory else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(layer: str, batch: int, contenders: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """Returns a row of times for each contender. One that fails spoils no other: it is tried apart, then left out."""
    found = cell(layer, batch, ["torch.nn", *contenders], options, memory=False)
    where: Row = {"kind": "time", "layer": layer, "batch": batch, "threads": options.threads}
    if "failed" not in found:
        return [{**where, "contender": name, **row} for name, row in found.items() if isinstance(row, dict)]
    if len(contenders) > 1:
        apart = [timed(layer, batch, [name], options) for name in contenders]
        return list({row["contender"]: row for rows in apart for row in rows}.values())
    return [{**where, "contender": name, "failed": found["failed"]} for name in contenders or ["torch.nn"]]


def measure(layer: str, batch: int, contenders: Sequence[str], options: argparse.Namespace, held: Measured) -> None:
    """Measures one layer at one batch size, as far as limits allow and the file has it not."""
    rows: list[Row] = []
    wanted: dict[str, list[str]] = {"time": [], "memory": []}
    for kind, names in wanted.items():
        for name in ("torch.nn", *contenders):
            row: Row = {"kind": kind, "layer": layer, "batch": batch, "contender": name}
            if held.key(row) in held.rows and not options.again:
                continue
            reason = beyond(layer, batch, name, gib=options.limit_gib, gflop=options.limit_gflop)
            if reason:
                rows.append({**row, "left_out": reason})
            else:
                names.append(name)
    if wanted["time"]:
        rows += timed(layer, batch, [name for name in wanted["time"] if name != "torch.nn"], options)
    # Memory does not mind company, and most of such a process is the loading of libraries.
    with ThreadPoolExecutor(2) as both:
        found = both.map(lambda name: cell(layer, batch, [name], options, memory=True), wanted["memory"])
        rows += [
            {"kind": "memory", "layer": layer, "batch": batch, "contender": name, "threads": options.threads, **each}
            for name, each in zip(wanted["memory"], found, strict=True)
        ]
    if rows:
        held.add(rows)
        print(layer, batch, *(shown(held.factor("time", layer, batch, name)) for name in contenders), flush=True)


def shown(value: float | None) -> str:
    """Returns a figure with three digits that mean something, or a dash."""
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def lines(held: Measured, kind: str, layer: str) -> list[list[str]]:
    """Returns the lines of one layer in the table of a kind."""
    found = []
    for batch in BATCHES:
        base = held.get(kind, layer, batch, "torch.nn", "ms" if kind == "time" else "mib")
        figures = [held.factor(kind, layer, batch, name) for name in PRIVATE]
        if base is None:
            continue
        line = [layer, str(batch), shown(base), *map(shown, figures)]
        if kind == "memory":
            more = 4 * batch * LAYERS[layer].parameters / 2**20
            line.append(shown((base + more) / max(base, 1.0)))
        found.append(line)
    return found


def report(held: Measured) -> str:
    """Returns the page of results."""
    now = held.machine
    versions = ", ".join(f"{name} {version}" for name, version in dict(now["versions"]).items())  # type: ignore[call-overload]
    threads = sorted({str(row["threads"]) for row in held.rows.values() if "threads" in row})
    described = [[n, each.described, str(each.parameters), each.predicted] for n, each in LAYERS.items()]
    note = held.path.with_suffix(".note")
    head = ["layer", "batch", "torch.nn", *(f"{name}, factor" for name in PRIVATE)]
    set_up = (
        f"{now['date']}; {now['processor']}, {now['cores']} cores, {now['memory_gib']} GiB; {', '.join(threads)} "
        f"threads; Python {now['python']}, {versions}. Written by `python -m benchmarks.layers`; do not edit."
    )
    parts = [
        "# Single layers: time and memory",
        set_up,
        note.read_text(encoding="utf-8").strip() if note.exists() else "",
        "![factor against batch size](layers.png)" if held.path.with_suffix(".png").exists() else "",
        "## Predicted",
        "Shapes as in the configuration of the paper's own micro-benchmark. B examples, P parameters, float32.",
        table(["layer", "what", "P", "what a private step adds, by counting"], described),
        "## Measured",
        ABOUT,
        "### Time",
        table(head, [line for layer in LAYERS for line in lines(held, "time", layer)]),
        "### Memory",
        table([*head, "materialised, predicted"], [line for layer in LAYERS for line in lines(held, "memory", layer)]),
    ]
    missing = [
        f"* {row['layer']} {row['batch']}, {row['contender']}: {reason}"
        for row in held.rows.values()
        if (reason := row.get("left_out") or row.get("failed"))
    ]
    parts += ["### Left out", "\n".join(dict.fromkeys(missing))] if missing else []
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(held: Measured) -> bool:
    """Returns whether the figure could be drawn: factor against batch size, on logarithmic axes."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(LAYERS), figsize=(3 * len(LAYERS), 6), sharex=True, squeeze=False)
    for row, kind in zip(axes, ("time", "memory"), strict=True):
        for ax, layer in zip(row, LAYERS, strict=True):
            for name in PRIVATE:
                points = [(b, f) for b in BATCHES if (f := held.factor(kind, layer, b, name)) is not None]
                ax.plot([b for b, _ in points], [f for _, f in points], marker="o", markersize=3, label=name)
            ax.axhline(1.0, color="grey", linewidth=0.8)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_title(layer if kind == "time" else "")
    for row, kind in zip(axes, ("time", "memory"), strict=True):
        row[0].set_ylabel(f"{kind}, factor to torch.nn")
    for ax in axes[1]:
        ax.set_xlabel("batch size")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(held.path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True


def main() -> None:
    """Measures what the command line asks for, and writes table and figure."""
    parser = argparse.ArgumentParser(description="Time and memory of single layers.")
    parser.add_argument("--out", type=Path, required=True, help="folder of layers.json, layers.md and layers.png")
    parser.add_argument("--layer", choices=LAYERS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--batch", type=int, choices=BATCHES, action="append", help="only this size (may be repeated)")
    parser.add_argument("--contender", choices=PRIVATE, action="append", help="only this one (may be repeated)")
    parser.add_argument("--seconds", type=float, default=1.5, help="about how long to time a cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=6.0, help="leave out what needs more memory")
    parser.add_argument("--limit-gflop", type=float, default=150.0, help="leave out steps of more work")
    parser.add_argument("--again", action="store_true", help="measure cells again that the file has")
    parser.add_argument("--note", help="circumstances that a reader must know; shown with the results")
    parser.add_argument("--report", action="store_true", help="measure nothing; write table and figure")
    parser.add_argument("--plot", action="store_true", help="measure nothing; draw the figure")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    held = Measured(options.out / "layers.json")
    if options.note is not None:
        held.path.with_suffix(".note").write_text(options.note + "\n", encoding="utf-8")
    if not (options.report or options.plot):
        for layer in options.layer or LAYERS:
            for batch in options.batch or BATCHES:
                measure(layer, batch, options.contender or PRIVATE, options, held)
    if not held.rows:
        return
    if not plot(held):
        print("matplotlib is not installed here: --plot draws the figure where it is")
    (options.out / "layers.md").write_text(report(held), encoding="utf-8")


if __name__ == "__main__":
    main()
