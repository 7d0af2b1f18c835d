"""The noise that a target asks for."""

from __future__ import annotations

import math
from typing import Any

from privet.opacus.accountants.registry import create_accountant

__all__ = ["MAX_SIGMA", "get_noise_multiplier"]

MAX_SIGMA = 1e6


def get_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "rdp",
    epsilon_tolerance: float = 0.01,
    **kwargs: Any,
) -> float:
    """Returns a noise multiplier whose ε at `target_delta` is at most `target_epsilon`, and less by little.

    Args:
        target_epsilon: ε at the end.
        target_delta: δ.
        sample_rate: the probability with which an example is in a batch.
        epochs: passes over the data, of 1 / sample_rate steps each. Give this or `steps`.
        steps: the number of steps.
        accountant: the name of an accountant.
        epsilon_tolerance: how much less ε may be than the target.
        **kwargs: for the accountant's `get_epsilon`.

    Raises:
        ValueError: if both or none of `epochs` and `steps` are given, or no noise reaches the target.
    """
    if (epochs is None) == (steps is None):
        raise ValueError("get_noise_multiplier takes epochs or steps, one of the two.")
    if steps is None:
        assert epochs is not None
        steps = math.ceil(epochs / sample_rate * (1.0 - 1e-12))  # never fewer than are taken
    asked = create_accountant(accountant)

    def epsilon(sigma: float) -> float:
        asked.history = [(sigma, sample_rate, steps)]
        return asked.get_epsilon(delta=target_delta, **kwargs)

    low, high = 0.0, 20.0
    reached = epsilon(high)
    while reached > target_epsilon:
        low, high = high, 2.0 * high
        if high > MAX_SIGMA:
            raise ValueError(
                f"the privacy budget is too low: no noise multiplier up to {MAX_SIGMA:g} reaches epsilon = "
                f"{target_epsilon:g} at delta = {target_delta:g}. Allow more, sample less, or take fewer steps."
            )
        reached = epsilon(high)
    while target_epsilon - reached > epsilon_tolerance:
        middle = (low + high) / 2.0
        if middle in (low, high):  # no number lies between: the accountant's figure jumps here
            break
        found = epsilon(middle)
        if found <= target_epsilon:
            high, reached = middle, found
        else:
            low = middle
    return high
