"""How near is ε, and how long does it take, beside dp_accounting, Opacus and prv_accountant?

    python -m benchmarks.accounting --out benchmarks/results [--peers /path/to/venv/bin/python]
    python -m benchmarks.accounting --out benchmarks/results --report       only table and figure again

The points are those of `benchmarks.accounting_points`. Each library runs in a process of its own on one thread
(`benchmarks.accounting_cell`), and all are asked about one point before the next, so that they share the load of the
machine. Times are seconds of the processor: medians of three answers, or one where it takes above 0.3 s. The reference
of a point is the greatest number that the true ε is proven to be at least; the oracle of the tests finds it at the same
time, on another core. Where a library has no answer within the limit, the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from benchmarks.accounting_points import CALIBRATIONS, SINGLE, Point, points
from benchmarks.accounting_report import report
from benchmarks.spine import machine

Row = dict[str, object]
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("numpy", "scipy", "dp-accounting", "prv-accountant", "opacus", "torch", "mpmath")


class Library:
    """A process that answers for one library, one question at a time."""

    def __init__(self, python: str, name: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
        command = [python, "-m", "benchmarks.accounting_cell", name]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, method: str, question: Row, limit: int, repeats: int = 3) -> Row:
        """Returns the answer, its time and memory, or why there is none."""
        if self.process.poll() is not None:
            return {"no_answer": "the library cannot be imported"}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"method": method, "question": question, "limit": limit, "repeats": repeats}
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            found: Row = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return {"no_answer": "the library cannot be imported"}
        return found

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def answers(libraries: dict[str, Library], point: Point, index: int) -> Row:
    """Returns what every library answers at one point. The slowest methods are asked at some points only."""
    question = point.row()
    few = point.group == "readme" or (point.group in {"rare", "of use"} and index % 3 == 0)
    found: Row = {}

    def ask(library: str, method: str, limit: int, repeats: int = 3) -> Row:
        answer = libraries[library].ask(method, question, limit, repeats)
        found[f"{library} {method}"] = answer
        return answer

    for method in ("pld", "bounds", "rdp", *(["gdp"] if few else [])):
        ask("privet", method, 10)
    usual = ask("dp_accounting", "1e-4", 3)
    seconds = usual.get("seconds")
    if isinstance(seconds, float) and seconds < 0.6:
        ask("dp_accounting", "lower", 3, 1)
    if isinstance(seconds, float) and seconds < 0.1:
        ask("dp_accounting", "1e-5", 3, 1)
    ask("opacus", "rdp", 3)
    ask("opacus", "prv", 3)
    if few:
        ask("prv_accountant", "interval", 5, 1)
    return found


def on_the_grid(libraries: dict[str, Library], seed: int) -> list[Row]:
    """Returns a row for each point: what was asked, what each library answered, and what the oracle proved."""
    rows: list[Row] = []
    waiting: list[tuple[Row, Future[Row]]] = []
    with ThreadPoolExecutor(1) as beside:
        for index, point in enumerate(points(seed)):
            found = answers(libraries, point, index)
            row: Row = {**point.row(), "answers": found}
            rows.append(row)
            mine = found["privet pld"]
            assert isinstance(mine, dict)
            near = mine.get("epsilon")
            if isinstance(near, float | int):
                asked = beside.submit(libraries["oracle"].ask, repr(float(near)), point.row(), 30, 1)
                waiting.append((row, asked))
            print(index, json.dumps(row), flush=True)
        for row, asked in waiting:
            row["oracle"] = asked.result()
    return rows


def calibrations(libraries: dict[str, Library]) -> list[Row]:
    """Returns a row for each target: σ, time and how often each library asked its accountant."""
    rows: list[Row] = []
    for index, (target, rate, steps, delta) in enumerate(CALIBRATIONS):
        question: Row = {"target": target, "rate": rate, "steps": steps, "delta": delta}
        found = {
            "privet pld": libraries["privet"].ask("calibrate", question, 20),
            "opacus rdp": libraries["opacus"].ask("calibrate rdp", question, 5, 1),
        }
        if index % 2 == 0:
            found["dp_accounting 1e-4"] = libraries["dp_accounting"].ask("calibrate", question, 10, 1)
        if index in {0, 6}:
            found["opacus prv"] = libraries["opacus"].ask("calibrate prv", question, 10, 1)
        rows.append({**question, "answers": found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def single(libraries: dict[str, Library]) -> dict[str, Row]:
    """Returns the answers to the single questions."""
    readme: Row = {"sigma": 1.0, "rate": 0.01, "steps": 10**4, "delta": 1e-5}
    ask: dict[str, Callable[[], Row]] = {
        "gdp": lambda: {"privet": libraries["privet"].ask("gdp", readme, 10)},
        "gdp_long": lambda: {"privet": libraries["privet"].ask("gdp", {**readme, "steps": 10**7}, 10)},
        "schedule": lambda: both("schedule", {**readme, "steps": 300}),
        "one_more": lambda: both("one_more", readme),
    }

    def both(method: str, question: Row) -> Row:
        return {name: libraries[name].ask(method, question, 10) for name in ("privet", "dp_accounting")}

    return {name: {"question": SINGLE[name], **each()} for name, each in ask.items()}


def versions(python: str) -> Row:
    """Returns the versions that an interpreter has installed of what matters here."""
    code = f"""
import importlib.metadata as m, json, platform
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))"""
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found: Row = json.loads(run.stdout)
    return found


def revision() -> str:
    """Returns the commit of the sources, if they are in a repository."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def measured(peers: str, seed: int) -> Row:
    """Returns everything, measured now."""
    begun, load = time.perf_counter(), os.getloadavg()[0]
    names = {"privet": sys.executable, "oracle": sys.executable}
    names |= dict.fromkeys(("dp_accounting", "opacus", "prv_accountant"), peers)
    libraries = {name: Library(python, name) for name, python in names.items()}
    try:
        grid = on_the_grid(libraries, seed)
        calibrated = calibrations(libraries)
        alone = single(libraries)
    finally:
        for library in libraries.values():
            library.close()
    return {
        "machine": machine(),
        "versions": {"privet": versions(sys.executable), "peers": versions(peers)},
        "revision": revision(),
        "seed": seed,
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": round(time.perf_counter() - begun),
        "grid": grid,
        "calibrations": calibrated,
        "single": alone,
    }


def main() -> None:
    """Measures, and writes result, table and figure."""
    parser = argparse.ArgumentParser(description="How near ε is, and how long it takes, beside the peers.")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the results")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--seed", type=int, default=20261128)
    parser.add_argument("--report", action="store_true", help="only write table and figure again")
    options = parser.parse_args()
    path = options.out / "accounting.json"
    if not options.report:
        options.out.mkdir(parents=True, exist_ok=True)
        held = measured(options.peers, options.seed)
        path.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    report(path)


if __name__ == "__main__":
    main()
