"""Draws docs/images/epsilon.png and attacker.png: what ε and δ say.

    python scripts/draw_privacy.py

The first shows the result of one noisy computation, with a person in the data and without: noise of the standard
deviation that has the ε written above. The second shows how often the best possible attacker is right, who guesses at
even odds whether a person was in the data: what (ε, δ) alone allows, and what Gaussian noise of that ε allows, which
is less (Dong, Roth and Su, "Gaussian Differential Privacy", 2022: Φ(μ/2) with μ = 1/σ).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.special import ndtr, ndtri

from privet.accounting import GaussianEvent, calibrate_noise_multiplier

mpl.use("Agg")
from matplotlib import pyplot as plt

DELTA = 1e-5
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def noise_for(epsilon: float) -> float:
    """Returns the standard deviation of one Gaussian release, for a sensitivity of 1, that costs ε at DELTA."""
    return float(calibrate_noise_multiplier(epsilon, DELTA, GaussianEvent, tolerance=1e-3).value)


def draw_releases() -> None:
    """Draws what is released with a person and without."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for panel, epsilon in zip(panels, (0.5, 3.0, 8.0), strict=True):
        sigma = noise_for(epsilon)
        x = np.linspace(0.5 - 4.5 * sigma, 0.5 + 4.5 * sigma, 400)
        for person, color, label in ((0, "tab:blue", "without the person"), (1, "tab:orange", "with the person")):
            density = np.exp(-((x - person) ** 2) / (2 * sigma**2))
            panel.fill_between(x, density, alpha=0.35, color=color, label=label)
            panel.plot(x, density, color=color)
        panel.set_title(f"ε = {epsilon:g}: noise {sigma:.1f} times\nthe most that a person can add", fontsize=11)
        panel.set_yticks([])
        panel.set_ylim(0, 1.45)
        panel.set_xlabel("what is released")
    panels[0].legend(loc="upper center")
    panels[0].set_ylabel("how likely")
    figure.savefig(IMAGES / "epsilon.png", dpi=110)
    plt.close(figure)


def draw_attacker() -> None:
    """Draws how often the best attacker is right."""
    epsilons = np.linspace(0.05, 10, 40)
    alone = (np.exp(epsilons) + DELTA) / (1 + np.exp(epsilons))
    gaussian = [ndtr(0.5 / noise_for(float(epsilon))) for epsilon in epsilons]
    figure, panel = plt.subplots(figsize=(6.5, 3.3), layout="constrained")
    panel.plot(epsilons, 100 * alone, "--", color="0.4", label="what ε and δ alone allow")
    panel.plot(epsilons, 100 * np.array(gaussian), color="tab:red", label="what Gaussian noise of that ε allows")
    panel.set_xlabel(f"ε at δ = {DELTA:g}")
    panel.set_ylabel("right guesses, %\n(50 is a coin)")
    panel.set_ylim(49, 101)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right")
    figure.savefig(IMAGES / "attacker.png", dpi=110)
    plt.close(figure)


def main() -> None:
    """Draws the pictures, and prints the figures of docs/start.md."""
    draw_releases()
    draw_attacker()
    for epsilon in (0.5, 1.0, 3.0, 8.0):
        sigma = noise_for(epsilon)
        found = ndtr(ndtri(0.01) + 1 / sigma)
        print(f"ε = {epsilon:g}: σ = {sigma:.3f}, right {ndtr(0.5 / sigma):.1%}, found at 1 % false alarms {found:.1%}")


if __name__ == "__main__":
    main()
