"""Runs the attacks and shows what becomes of them. Exit status 1 if the guarantee is broken by one."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import attacks.programs  # noqa: F401 - it fills the table
from attacks.table import ATTACKS, judged, markdown

COLORS = {"BROKEN": "bold red", "unseen and documented": "yellow"}


def main() -> int:
    """Runs those whose class or name holds a word of the command line, all by default."""
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("words", nargs="*", help="run only attacks whose class or name holds one of these")
    parser.add_argument("--out", type=Path, help="write the table to this page")
    options = parser.parse_args()
    chosen = [a for a in ATTACKS if not options.words or any(w in f"{a.kind} {a.name}" for w in options.words)]
    begun, console, results = time.perf_counter(), Console(), []
    table = Table("class", "attack", "what happens", "what is said or measured", title="Attacks")
    for each in chosen:
        result = judged(each)
        results.append(result)
        table.add_row(each.kind, each.name, f"[{COLORS.get(result.verdict, 'green')}]{result.verdict}[/]", result.said)
    console.print(table)
    broken = [r.attack.name for r in results if r.broken]
    console.print(f"{len(results)} attacks in {time.perf_counter() - begun:.0f} s; {len(broken)} BROKEN")
    if options.out is not None:
        note = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} CPU."
        options.out.write_text(markdown(results, note=note), encoding="utf-8")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
