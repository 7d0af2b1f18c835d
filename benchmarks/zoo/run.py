"""Runs cases in processes of their own, so that one that ends badly, or never, ends nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from threading import Lock
from typing import Any

from benchmarks.zoo.case import Case
from benchmarks.zoo.examine import Finding, examine
from benchmarks.zoo.families import FAMILIES, missing, of_all
from benchmarks.zoo.vision_ops import declare

__all__ = ["Results", "run"]

PACKAGES = ("torch", "transformers", "peft", "timm", "diffusers", "torch_geometric", "privet")


class Results:
    """What was found so far, by the case's family and name, and the file that it lives in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.found: dict[str, Finding] = held.get("found", {})
        self.about: dict[str, Any] = held.get("about", {})

    @staticmethod
    def key(case: Case) -> str:
        """Returns what tells a case from all others."""
        return f"{case.family}: {case.name}"

    def add(self, case: Case, finding: Finding) -> None:
        """Keeps one finding, in the file as well."""
        with self._lock:
            now = datetime.now(tz=UTC).date().isoformat()
            self.found[self.key(case)] = {**finding, "note": case.note, "refused": case.refused, "date": now}
            self.about = about()
            text = json.dumps({"about": self.about, "found": self.found}, indent=1, ensure_ascii=False)
            part = self.path.with_suffix(".part")
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(self.path)


def about() -> dict[str, Any]:
    """Returns the versions and the machine of a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.now(tz=UTC).date().isoformat(),
    }


def _serve(connection: Connection) -> None:
    """Examines the cases that come, until there are no more. It is what a process of its own does."""
    import torch

    torch.set_num_threads(1)
    declare()
    known = {(family, case.name): case for family in FAMILIES for case in of_all(family)}
    while (asked := connection.recv()) is not None:
        connection.send(examine(known[asked[:2]], short=asked[2]))


class _Worker:
    """A process that examines one case after the other. It is started anew after one that it did not survive."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def examine(self, family: str, case: Case, seconds: float, *, short: bool) -> Finding:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
        lost: Finding = {"name": case.name, "family": case.family, "verdict": "not finished"}
        try:
            self._connection.send((family, case.name, short))
            if self._connection.poll(seconds):
                found: Finding = self._connection.recv()
                return found
            message = f"it took more than {seconds:g} seconds"
        except (EOFError, BrokenPipeError):
            message = "its process ended"
        self.end()
        return lost | {"message": message}

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def run(
    wanted: Sequence[tuple[str, Case]],
    results: Results,
    *,
    seconds: float,
    short: bool,
    jobs: int,
    done: Callable[[Case, Finding], None],
) -> None:
    """Examines cases, given with the files of their families, and keeps what is found; `done` is told of each."""
    waiting: Queue[tuple[str, Case]] = Queue()
    for each in wanted:
        waiting.put(each)

    def work() -> None:
        worker = _Worker()
        try:
            while True:
                family, case = waiting.get_nowait()
                absent = missing(case)
                if absent:
                    words = f"{', '.join(absent)} is not installed"
                    finding: Finding = {
                        "name": case.name,
                        "family": case.family,
                        "verdict": "left out",
                        "message": words,
                    }
                else:
                    finding = worker.examine(family, case, seconds, short=short)
                results.add(case, finding)
                done(case, finding)
        except Empty:
            worker.end()

    with ThreadPoolExecutor(jobs) as pool:
        for each in [pool.submit(work) for _ in range(jobs)]:
            each.result()
