"""How long does a private step take, and how much memory, beside PyTorch without privacy and beside Opacus?

    python -m benchmarks.spine --out benchmarks/results            every cell, then the tables (hours on two cores)
    python -m benchmarks.spine --out ... --network mnist --batch 64
    python -m benchmarks.spine --out ... --report                  only write the tables again

Every cell runs in a process of its own (`benchmarks.spine_cell`, which also runs alone); cells that the result file
has already are not run again, unless they are asked for with `--again`. What a ratio is a ratio to: see there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.networks import NETWORKS

Row = dict[str, object]
CONTENDERS = ("plain", "privet", "privet engine", "opacus", "opacus ghost")
WRITTEN = "as written"
# The fields that tell one cell from another.
KEY = ("network", "batch", "contender", "form", "floor_form", "memory")

ABOUT_TIME = """\
Every figure after the floor's is a ratio to the *floor*: zero_grad, forward, backward and an SGD step without privacy,
plus one `torch.randn` over the parameters; medians over alternating pairs. The data loader is left out. *privet* is the
explicit door, *privet engine* the paper's. The floor of the first ratios is the model as written; *best form* names the
form in which the step without privacy is quickest (and its time as a part of the written one's), and the next column is
privet's ratio to the floor in that form, with the same form given to privet where it has one. A ratio below 1 is not
free privacy: there, privet computes something in a better way than PyTorch's own step does. The first step includes the
comparison of gradients with autograd's own."""
ABOUT_MEMORY = """\
MiB at the peak of a step above what was resident before the first, by the kernel's high-water mark, each in a process
of its own."""


def other_form(network: str) -> str | None:
    """Returns the name of the network's other form, in which it may be faster without privacy."""
    described = NETWORKS[network]
    if described.channels_last:
        return "channels_last"
    return "sparse" if described.sparse else None


def cells(network: str, batch: int) -> Iterator[Row]:
    """Yields what there is to measure of one network and batch size."""
    what: Row = {"network": network, "batch": batch, "form": WRITTEN, "floor_form": WRITTEN, "memory": False}
    for contender in CONTENDERS:
        yield {**what, "contender": contender}
        yield {**what, "contender": contender, "memory": True}
    other = other_form(network)
    if other:
        # A private gradient is dense, so that the sparse form is the floor's alone.
        private = other if other == "channels_last" else WRITTEN
        yield {**what, "contender": "plain", "form": other}
        yield {**what, "contender": "plain", "form": other, "memory": True}
        yield {**what, "contender": "privet", "form": private, "floor_form": other}
        yield {**what, "contender": "privet engine", "form": private, "floor_form": other}


def run(cell: Row, options: argparse.Namespace) -> Row:
    """Returns the measurement of one cell, taken in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.spine_cell", "--threads", str(options.threads)]
    for name in ("network", "batch", "contender", "form"):
        command += [f"--{name}", str(cell[name])]
    command += ["--floor-form", str(cell["floor_form"]), "--seconds", str(options.seconds)]
    command += ["--memory"] if cell["memory"] else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        return {**cell, "failed": tail[0]}
    measured: Row = json.loads(done.stdout.splitlines()[-1])
    return measured


def machine() -> Row:
    """Returns what was measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="ascii")) if cpuinfo.exists() else None
    versions = {}
    for name in ("torch", "numpy", "cryptography", "opacus"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
        "versions": versions,
    }


class Results:
    """The measurements so far, by cell, and the file that they live in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[object, ...], Row] = {}
        self.machine: Row = {}
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            self.machine = held["machine"]
            self.rows = {tuple(row[name] for name in KEY): row for row in held["rows"]}

    def add(self, row: Row) -> None:
        """Keeps a measurement, in the file as well."""
        self.rows[tuple(row[name] for name in KEY)] = row
        self.machine = machine()
        text = json.dumps({"machine": self.machine, "rows": list(self.rows.values())}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")

    @property
    def note(self) -> str:
        """Returns the circumstances that a reader must know, kept beside the file."""
        note = self.path.with_suffix(".note")
        return note.read_text(encoding="utf-8").strip() if note.exists() else ""

    def get(self, field: str, network: str, batch: int, contender: str, **but: object) -> float | None:
        """Returns one figure, or None where it was not measured."""
        what = {"form": WRITTEN, "floor_form": WRITTEN, "memory": field == "peak_mib", **but}
        row = self.rows.get((network, batch, contender, what["form"], what["floor_form"], what["memory"]), {})
        value = row.get(field)
        return value if isinstance(value, float | int) else None


def shown(value: float | None, digits: int = 2) -> str:
    """Returns a figure as a table shows it."""
    return "-" if value is None else f"{value:.{digits}f}"


def best(*values: float | None) -> float | None:
    """Returns the least of the figures that there are."""
    return min((value for value in values if value is not None), default=None)


def speed_row(results: Results, network: str, batch: int) -> list[str]:
    """Returns one line of the table of times."""
    other = other_form(network)
    quicker = results.get("ratio", network, batch, "plain", form=other) if other else None
    written = results.get("ratio", network, batch, "plain")
    if other and quicker and written and quicker < written:
        private = other if other == "channels_last" else WRITTEN
        against_best = results.get("ratio", network, batch, "privet", form=private, floor_form=other)
        name = f"{other} ({shown(quicker / written)})"
    else:
        against_best, name = results.get("ratio", network, batch, "privet"), WRITTEN
    figures = [results.get("ratio", network, batch, contender) for contender in CONTENDERS[1:]]
    floor = best(*(results.get("floor_ms", network, batch, each) for each in CONTENDERS))
    first = results.get("first_ms", network, batch, "privet")
    return [
        network, str(batch), shown(floor, 1), *map(shown, figures[:2]), name, shown(against_best),
        *map(shown, figures[2:]), shown(first, 0),
    ]  # fmt: skip


def memory_row(results: Results, network: str, batch: int) -> list[str]:
    """Returns one line of the table of memory."""
    figures = [results.get("peak_mib", network, batch, contender) for contender in CONTENDERS]
    other = other_form(network)
    quicker = results.get("peak_mib", network, batch, "plain", form=other) if other else None
    return [network, str(batch), *(shown(figure, 0) for figure in (figures[0], quicker, *figures[1:]))]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def summary(results: Results) -> str:
    """Returns the geometric mean and the worst of each contender's ratios to the floor."""
    lines = []
    for contender in CONTENDERS[1:]:
        measured = {
            (network, batch): ratio
            for network, described in NETWORKS.items()
            for batch in described.batches
            if (ratio := results.get("ratio", network, batch, contender)) is not None
        }
        if measured:
            mean = math.exp(sum(map(math.log, measured.values())) / len(measured))
            worst = max(measured, key=measured.__getitem__)
            lines.append(
                f"* {contender}: geometric mean {mean:.2f} over {len(measured)} cells, "
                f"at worst {measured[worst]:.2f} ({worst[0]} {worst[1]})"
            )
    return "\n".join(lines)


def report(results: Results) -> str:
    """Returns the page of results."""
    measured = {(row["network"], row["batch"]) for row in results.rows.values()}
    which = [(name, batch) for name, described in NETWORKS.items() for batch in described.batches]
    missing = [f"{name} {batch}" for name, batch in which if (name, batch) not in measured]
    which = [each for each in which if each in measured]
    machine_now = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in dict(machine_now["versions"]).items())  # type: ignore[call-overload]
    threads = sorted({str(row["threads"]) for row in results.rows.values() if "threads" in row})
    failures = [row for row in results.rows.values() if "failed" in row]
    set_up = (
        f"{machine_now['date']}; {machine_now['processor']}, {machine_now['cores']} cores, "
        f"{machine_now['memory_gib']} GiB; {', '.join(threads)} threads; Python {machine_now['python']}, {versions}."
    )
    speed_head = [
        "network", "batch", "floor, ms", "privet", "privet engine", "best form without privacy", "privet to that floor",
        "Opacus", "Opacus ghost", "privet's first step, ms",
    ]  # fmt: skip
    memory_head = [
        "network", "batch", "no privacy", "no privacy, other form", "privet", "privet engine", "Opacus", "Opacus ghost"
    ]  # fmt: skip
    parts = [
        "# Whole steps: time and memory",
        f"{set_up} Written by `python -m benchmarks.spine`; do not edit.",
        results.note,
        "## Time",
        ABOUT_TIME,
        table(speed_head, [speed_row(results, *each) for each in which]),
        summary(results),
        "## Memory",
        ABOUT_MEMORY,
        table(memory_head, [memory_row(results, *each) for each in which]),
    ]
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    if failures:
        lines = [f"* {row['contender']}, {row['network']} {row['batch']}: {row['failed']}" for row in failures]
        parts += ["## Not measured", "\n".join(dict.fromkeys(lines))]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Measures what the command line asks for, and writes the tables."""
    parser = argparse.ArgumentParser(description="Time and memory of whole steps.")
    parser.add_argument("--out", type=Path, required=True, help="folder of spine.json and spine.md")
    parser.add_argument("--network", choices=NETWORKS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--batch", type=int, action="append", help="only this size (may be repeated)")
    parser.add_argument("--contender", action="append", help="only this one (may be repeated)")
    parser.add_argument("--only", choices=("time", "memory"), help="time wants a quiet machine, memory does not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="about how long to time pairs, per cell")
    parser.add_argument("--again", action="store_true", help="measure cells again that the file has")
    parser.add_argument("--note", help="circumstances that a reader must know; shown with the results")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "spine.json")
    if options.note is not None:
        results.path.with_suffix(".note").write_text(options.note + "\n", encoding="utf-8")
    for network in [] if options.report else options.network or NETWORKS:
        for batch in options.batch or NETWORKS[network].batches:
            for cell in cells(network, batch):
                known = tuple(cell[name] for name in KEY) in results.rows
                if (known and not options.again) or (options.contender and cell["contender"] not in options.contender):
                    continue
                if options.only and (options.only == "memory") != cell["memory"]:
                    continue
                row = run(cell, options)
                results.add(row)
                figure = row.get("failed") or row.get("ratio") or row.get("peak_mib")
                print(*(cell[name] for name in KEY), figure, sep="  ", flush=True)
    if results.rows:
        (options.out / "spine.md").write_text(report(results), encoding="utf-8")
        print(f"wrote {options.out / 'spine.md'}")


if __name__ == "__main__":
    main()
