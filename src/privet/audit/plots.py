"""Pictures of audits. Matplotlib is loaded here and nowhere else (`pip install privet[plots]`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from privet.accounting.accountant import get_accountant
from privet.accounting.phases import spent
from privet.audit.claim import Claim
from privet.audit.roc import Roc
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

__all__ = ["plot_bounds", "plot_roc"]


def plot_roc(curves: Mapping[str, Roc], *, claimed: Any = None, axes: Axes | None = None) -> Axes:
    """Draws ROC curves on logarithmic axes, and above them what the claimed privacy allows any attack.

    Args:
        curves: each attack by its name.
        claimed: what holds the bill (an engine, a step, a ledger, an event), or None.
        axes: where to draw; new ones by default.
    """
    axes = _axes(axes)
    least = min(1.0 / roc.others.size for roc in curves.values()) / 2.0
    for name, roc in curves.items():
        false, true = roc.curve()
        axes.plot(np.maximum(false, least), np.maximum(true, least), label=f"{name} (AUC {roc.auc:.3f})")
    rates = np.geomspace(least, 1.0, 25)
    if claimed is not None:
        claim = Claim.of(claimed)
        event, accountant = spent(claim.phases), get_accountant("pld")
        allowed = [accountant.true_positive_rate(event, float(rate), relation=claim.relation) for rate in rates]
        axes.plot(rates, allowed, "k--", label="what the claim allows")
    axes.plot(rates, rates, color="0.7", linewidth=1, label="guessing")
    axes.set(xscale="log", yscale="log", xlabel="false positive rate", ylabel="true positive rate", ylim=(least, 1.3))
    axes.legend(loc="lower right", frameon=False)
    return axes


def plot_bounds(claimed: Sequence[float], audited: Mapping[str, Sequence[float]], *, axes: Axes | None = None) -> Axes:
    """Draws audited lower bounds against claimed ε: every point has to lie under the diagonal.

    Args:
        claimed: finite ε.
        audited: lower bounds for each of them, by the kind of audit.
        axes: where to draw; new ones by default.
    """
    axes = _axes(axes)
    line = np.array([min(claimed) / 2.0, max(claimed) * 2.0])
    axes.plot(line, line, "k--", label="claimed ε")
    for name, bounds in audited.items():
        axes.plot(claimed, np.maximum(bounds, line[0] / 50.0), "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="claimed ε", ylabel="lower bound on ε")
    axes.legend(frameon=False)
    return axes


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigurationError("matplotlib draws plots and is not installed: pip install 'privet[plots]'.") from error
    return plt.subplots(figsize=(5.5, 4.2), layout="constrained")[1]
