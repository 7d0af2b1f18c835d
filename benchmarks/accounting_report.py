"""Tables and figure of the accounting benchmark, from its JSON."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["METHODS", "reference", "report", "summary"]

Row = dict[str, Any]
# method: the words that the table and the figure use
METHODS = {
    "privet pld": "privet pld",
    "privet bounds": "privet pld, both bounds",
    "privet rdp": "privet rdp",
    "privet gdp": "privet gdp (some points)",
    "dp_accounting 1e-4": "dp_accounting PLD, spacing 1e-4",
    "dp_accounting 1e-5": "dp_accounting PLD, spacing 1e-5 (where quick)",
    "opacus rdp": "Opacus RDP",
    "opacus prv": "Opacus PRV, error 0.01",
    "prv_accountant interval": "prv_accountant, error 0.01 (some points)",
}
DRAWN = {
    "privet pld": ("black", "-", "", 2.4),
    "privet rdp": ("black", ":", "", 1.6),
    "dp_accounting 1e-4": ("tab:orange", "-", "o", 1.0),
    "opacus rdp": ("tab:blue", ":", "^", 1.0),
    "opacus prv": ("tab:blue", "--", "s", 1.0),
    "prv_accountant interval": ("tab:green", "-.", "D", 1.0),
}
SLACK = 1e-6  # relative: below a bound by less than this is rounding


def value(answer: Row | None, name: str = "epsilon") -> float | None:
    """Returns a number of an answer, or None where there is none."""
    found = None if answer is None else answer.get(name)
    return None if found is None else float(found)


def reference(row: Row) -> tuple[float, str]:
    """Returns the greatest proven lower bound of a point's ε, and where it is from."""
    oracle = row.get("oracle")
    low, high = value(oracle, "lower"), value(oracle)
    if low is not None and high is not None and high <= low * (1.0 + 1e-4) + 1e-12:
        return low, "oracle"
    known = [(low or 0.0, "oracle, lower bound only")]
    for method, name, words in (
        ("privet bounds", "lower", "privet's lower bound"),
        ("dp_accounting lower", "epsilon", "dp_accounting's lower bound"),
    ):
        known.append((value(row["answers"].get(method), name) or 0.0, words))
    return max(known)


def ratios(rows: Sequence[Row], method: str) -> list[tuple[float, Row]]:
    """Returns ε over the reference, ascending, at the points where the reference is above 0 and there is an answer."""
    found = []
    for row in rows:
        known, answer = reference(row)[0], value(row["answers"].get(method))
        if known > 0.0 and answer is not None and not math.isnan(answer):
            found.append((answer / known, row))
    return sorted(found, key=lambda each: each[0])


def percents(rows: Sequence[Row], method: str) -> list[float]:
    """Returns how far ε is above the reference in per cent, ascending."""
    return [100.0 * (ratio - 1.0) for ratio, _ in ratios(rows, method)]


def milliseconds(rows: Sequence[Row], method: str) -> list[float]:
    """Returns the times of a method, ascending."""
    return [1e3 * each for each in numbers(rows, method, "seconds")]


def numbers(rows: Sequence[Row], method: str, name: str) -> list[float]:
    """Returns one number of every answer, ascending."""
    found = [value(row["answers"].get(method), name) for row in rows]
    return sorted(each for each in found if each is not None)


def at(ordered: Sequence[float], share: float) -> float:
    """Returns the number below which that share of the numbers lies."""
    return ordered[min(math.ceil(share * len(ordered)) - 1, len(ordered) - 1)] if ordered else math.nan


def excess(ratio: float) -> str:
    """Returns a ratio in words: in per cent above 1, or as a factor."""
    if not math.isfinite(ratio):
        return "–" if math.isnan(ratio) else "∞"
    if ratio >= 2.0:
        return f"{ratio:.3g} times"
    return f"{100.0 * (ratio - 1.0):+.2g} %" if abs(ratio - 1.0) >= 5e-5 else "0.00 %"


def below(row: Row, method: str) -> bool:
    """Says whether an answer is below what the true ε is proven to be at least."""
    answer = value(row["answers"].get(method))
    return answer is not None and max(answer, 0.0) < reference(row)[0] * (1.0 - SLACK)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary(rows: Sequence[Row]) -> str:
    """Returns the table that compares the libraries."""
    lines = []
    for method, words in METHODS.items():
        asked = [row for row in rows if method in row["answers"]]
        answered = [row for row in asked if value(row["answers"][method]) is not None]
        near = [ratio for ratio, _ in ratios(asked, method)]
        times, memory = numbers(rows, method, "seconds"), numbers(rows, method, "memory_mib")
        lines.append(
            [
                words,
                f"{len(answered)} of {len(asked)}",
                *(excess(at(near, share)) for share in (0.5, 0.9, 1.0)),
                str(sum(below(row, method) for row in answered)),
                *(f"{1e3 * at(times, share):.3g}" for share in (0.5, 0.9, 1.0)),
                *(f"{at(memory, share):.0f}" for share in (0.5, 1.0)),
            ]
        )
    head = ["method", "answers", "ε above the reference: median", "90 %", "most", "below it"]
    return table([*head, "ms: median", "90 %", "most", "MiB: median", "most"], lines)


def by_point(rows: Sequence[Row]) -> str:
    """Returns the table of every point."""

    def cell(row: Row, method: str) -> str:
        answer = row["answers"].get(method)
        if answer is None:
            return ""
        if value(answer) is None:
            return "none"
        mark = " **below**" if below(row, method) else ""
        return f"{value(answer):.5g}{mark} ({1e3 * answer['seconds']:.3g})"

    shown = [name for name in METHODS if name != "dp_accounting 1e-5"]
    lines = []
    for row in rows:
        known, source = reference(row)
        point = [f"{row[name]:.4g}" for name in ("sigma", "rate", "steps", "delta")]
        low = value(row["answers"]["privet bounds"], "lower")
        cells = [cell(row, name) for name in shown]
        lines.append([row["group"], *point, f"{known:.6g}", source, "–" if low is None else f"{low:.6g}", *cells])
    head = ["points", "σ", "q", "T", "δ", "reference", "from", "privet lower"]
    return table([*head, *(METHODS[name].replace(" (some points)", "") for name in shown)], lines)


def calibrated(rows: Sequence[Row]) -> str:
    """Returns the table of calibrations."""

    def cell(answer: Row | None) -> str:
        if answer is None:
            return ""
        if value(answer, "sigma") is None:
            return "none " + str(answer.get("no_answer", ""))[:40]
        quick = f" + {answer['quick_calls']:.0f} quick" if "quick_calls" in answer else ""
        return f"{answer['sigma']:.6g} ({1e3 * answer['seconds']:.4g} ms, {answer['calls']:.0f}{quick})"

    names = ("privet pld", "dp_accounting 1e-4", "opacus rdp", "opacus prv")
    lines = [
        [
            *(f"{row[name]:g}" for name in ("target", "rate", "steps", "delta")),
            *(cell(row["answers"].get(n)) for n in names),
        ]
        for row in rows
    ]
    return table(["ε", "q", "T", "δ", "privet pld", "dp_accounting PLD", "Opacus RDP", "Opacus PRV"], lines)


def alone(single: dict[str, Row]) -> str:
    """Returns the table of single questions."""

    def cell(answer: Row | None) -> str:
        if answer is None:
            return ""
        found = value(answer)
        return str(answer.get("no_answer")) if found is None else f"{found:.6g} ({1e3 * answer['seconds']:.4g} ms)"

    lines = [[row["question"], cell(row.get("privet")), cell(row.get("dp_accounting"))] for row in single.values()]
    return table(["question", "privet", "dp_accounting"], lines)


def machine_line(held: Row) -> str:
    """Returns when and with what everything was measured."""
    machine, peers = held["machine"], held["versions"]["peers"]
    versions = ", ".join(f"{name} {number}" for name, number in peers.items() if name != "python")
    mine = held["versions"]["privet"]
    return (
        f"{machine['date']}; {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; one thread "
        f"a library; load average {held['load_average'][0]} at the start and {held['load_average'][1]} at the end; "
        f"seed {held['seed']}; {held['seconds']} s in all. privet: Python {mine['python']}, numpy {mine['numpy']}, "
        f"scipy {mine['scipy']}, revision {held['revision']}. The others: Python {peers['python']}, {versions}."
    )


def report(path: Path) -> None:
    """Writes the table and the figure beside the JSON file."""
    held = json.loads(path.read_text(encoding="utf-8"))
    grid = held["grid"]
    drawn = draw(grid, path.with_suffix(".png"))
    sources = [reference(row)[1] for row in grid]
    counted = ", ".join(f"{name} at {sources.count(name)}" for name in sorted(set(sources)))
    zero = sum(reference(row)[0] == 0.0 for row in grid)
    about = (
        f"{len(grid)} points. The reference is the greatest proven lower bound of ε: {counted}. No ratio counts the "
        f"{zero} points where it is 0. Times are of the processor, of one loaded machine in one run: compare them with "
        "each other only."
    )
    large = [row for row in grid if reference(row)[0] > 0.01]
    parts = [
        "# Accounting beside the peers",
        machine_line(held) + " Written by `python -m benchmarks.accounting`; do not edit.",
        "![how near and how fast](accounting.png)" if drawn else "",
        about,
        summary(grid),
        f"The same for the {len(large)} points whose reference is above 0.01:",
        summary(large),
        "## Calibration: σ for a target ε (time, calls of the accountant)",
        calibrated(held["calibrations"]),
        "## Single questions",
        alone(held["single"]),
        "## Every point: ε (milliseconds)",
        by_point(grid),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draws the two panels, each method's points in ascending order. Returns False where there is no matplotlib.

    The line of a method ends at the share of points at which it had an answer.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2))
    panels: tuple[tuple[str, float, float, float, Callable[[str], list[float]]], ...] = (
        ("ε above the best proven lower bound, in % (line: 1 %)", 1e-5, 1e5, 1.0, lambda m: percents(rows, m)),
        ("time for one ε, in ms (line: 50 ms)", 1.0, 5e3, 50.0, lambda m: milliseconds(rows, m)),
    )
    for ax, (label, low, high, line, of) in zip(axes, panels, strict=True):
        for method, (color, style, marker, width) in DRAWN.items():
            asked = sum(method in row["answers"] and (reference(row)[0] > 0.0 or ax is axes[1]) for row in rows)
            found = of(method)
            shares = [100.0 * (i + 0.5) / asked for i in range(len(found))]
            ys = [max(each, low) for each in found]
            ax.plot(
                shares, ys, color=color, ls=style, lw=width, marker=marker, ms=3, label=METHODS[method], clip_on=True
            )
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        ax.axhline(line, color="0.5", linewidth=0.9)
        ax.set_xlabel("points, each method's own ascending order, in %")
        ax.set_title(label, fontsize=11)
        ax.grid(visible=True, which="major", color="0.85", linewidth=0.7)
    handles, words = axes[0].get_legend_handles_labels()
    figure.legend(handles, words, loc="lower center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return True
