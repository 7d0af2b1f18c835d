"""Draws docs/images/epsilon.png: what ε and δ say, in two pictures.

    python scripts/draw_privacy.py

On the left, the result of one noisy computation, with a person in the data and without: noise of the standard deviation
that has the ε written above. On the right, how often the best possible attacker is right who guesses whether a person
was in the data, before odds being even: what (ε, δ) alone allows, and what Gaussian noise of that ε allows, which is
less (Dong, Roth and Su, "Gaussian Differential Privacy", 2022: Φ(μ/2) with μ = 1/σ).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy.special import ndtr

from privet.accounting import GaussianEvent, calibrate_noise_multiplier

mpl.use("Agg")
from matplotlib import pyplot as plt

DELTA = 1e-5
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "epsilon.png"


def noise_for(epsilon: float) -> float:
    """Returns the standard deviation of one Gaussian release, for a sensitivity of 1, that costs ε at DELTA."""
    return float(calibrate_noise_multiplier(epsilon, DELTA, GaussianEvent, tolerance=1e-3).value)


def main() -> None:
    """Draws the picture."""
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained", width_ratios=[1, 1, 1, 1.7])
    for panel, epsilon in zip(panels, (0.5, 3.0, 8.0), strict=False):
        sigma = noise_for(epsilon)
        x = np.linspace(0.5 - 4.5 * sigma, 0.5 + 4.5 * sigma, 400)
        for person, color, label in ((0, "tab:blue", "without the person"), (1, "tab:orange", "with the person")):
            density = np.exp(-((x - person) ** 2) / (2 * sigma**2))
            panel.fill_between(x, density, alpha=0.35, color=color, label=label)
            panel.plot(x, density, color=color)
        panel.set_title(f"ε = {epsilon:g}: noise {sigma:.2f} times\nthe most that a person can add", fontsize=10)
        panel.set_yticks([])
        panel.set_ylim(0, 1.5)
        panel.set_xlabel("what is released")
    panels[0].legend(loc="upper center", fontsize=9)
    panels[0].set_ylabel("how likely")

    epsilons = np.linspace(0.05, 10, 40)
    alone = (np.exp(epsilons) + DELTA) / (1 + np.exp(epsilons))
    gaussian = [ndtr(0.5 / noise_for(float(epsilon))) for epsilon in epsilons]
    panels[3].plot(epsilons, 100 * alone, "--", color="0.4", label="what ε and δ alone allow")
    panels[3].plot(epsilons, 100 * np.array(gaussian), color="tab:red", label="what Gaussian noise of that ε allows")
    panels[3].set_title("how often the best attacker is right\nwho guesses “in the data or not”", fontsize=10)
    panels[3].set_xlabel(f"ε at δ = {DELTA:g}")
    panels[3].set_ylabel("%, and 50 is a coin")
    panels[3].set_ylim(49, 101)
    panels[3].grid(alpha=0.3)
    panels[3].legend(loc="lower right")
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)
    for epsilon in (0.5, 1.0, 3.0, 8.0):
        sigma = noise_for(epsilon)
        print(f"ε = {epsilon:g}: σ = {sigma:.3f}, right {ndtr(0.5 / sigma):.1%}, found at 1 % false alarms "
              f"{ndtr(-2.3263 + 1 / sigma):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
