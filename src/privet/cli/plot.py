"""The curve ε(δ) as a picture. Matplotlib is asked for only when a picture is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from privet.errors import ConfigurationError

__all__ = ["check_plot", "plot_curve"]


def check_plot(path: Path) -> None:
    """Refuses a picture that cannot be made: without matplotlib, in an unknown format, or in a folder that is not."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigurationError("--plot needs matplotlib: pip install 'privet[plots]'.") from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigurationError(
            f"The plot cannot be written to {path}: expected a file name that ends in one of "
            f"{', '.join(f'.{each}' for each in sorted(known))}."
        )
    if not path.parent.is_dir():
        raise ConfigurationError(f"The plot cannot be written to {path}: {path.parent} is not a folder.")


def plot_curve(path: Path, deltas: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    """Draws ε over δ for each accountant into a file whose suffix says its format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, epsilons in curves.items():
        points = sorted((d, e) for d, e in zip(deltas, epsilons, strict=True) if d > 0.0 and math.isfinite(e))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=name)
    if not axes.lines:
        raise ConfigurationError("There is nothing to draw: ε is infinite at every δ.")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("δ")
    axes.set_ylabel("ε")
    axes.set_title("Privacy curve: upper bounds")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(title="accountant", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The plot cannot be written to {path}: {error}") from None
