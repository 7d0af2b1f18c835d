"""Is a number that was asked for one that protects anybody? δ beside n, σ, the clip norm and the rate."""

from __future__ import annotations

import warnings

from privet.errors import ConfigurationError
from privet.mechanism import Mechanism

__all__ = ["refuse_budget_without_noise", "warn_of_delta", "warn_of_mechanism"]

_LEAST_NOISE = 0.05  # one unsampled release then costs an ε of about 1 / (2 σ²) = 200
_MOST_NOISE = 10.0  # noise over the longest sum that a batch of the expected size can have
_CLIP_NORMS = (1e-12, 1e12)


def warn_of_delta(name: str, delta: float, records: int | None) -> bool:
    """Warns if δ is 1/n or more, n being the number of records. Returns whether it did."""
    if records is None or delta * records < 1.0:
        return False
    warnings.warn(
        f"{name} = {delta:g} is 1/n or more, with n = {records} records: to publish one record at random, in clear, "
        f"has that δ too. Expected a δ well below 1/n. Give {0.1 / records:.1g} or less.",
        stacklevel=4,
    )
    return True


def refuse_budget_without_noise(mechanism: Mechanism, *, has_budget: bool) -> None:
    """Raises if there is a budget, and no noise to meet it with."""
    if has_budget and mechanism.noise.multiplier == 0.0:
        raise ConfigurationError(
            "the noise multiplier is 0, so that ε is infinite from the first step, and there is a budget, which no "
            "step would fit. Expected noise with a budget. Give a noise multiplier above 0, or no budget."
        )


def warn_of_mechanism(mechanism: Mechanism, *, batch_size: float | None) -> None:
    """Warns of numbers with which training is not private in any useful sense, or does not train."""
    noise, clip_norm = mechanism.noise.multiplier, mechanism.clipping.sensitivity
    if noise == 0.0:
        _warn(
            "the noise multiplier is 0: this trains without noise, and ε is infinite. Expected a number above 0 where "
            "the data is to be protected. Zero is for tests and for looking at clipping alone."
        )
    elif noise < _LEAST_NOISE:
        _warn(
            f"the noise multiplier is {noise:g}, with which one step costs an ε of up to {0.5 / noise**2:.3g}: next to "
            "no protection. Expected 0.5 or more as a rule. It is relative to the clip norm, not to the gradients."
        )
    elif batch_size is not None and noise > _MOST_NOISE * batch_size:
        _warn(
            f"the noise multiplier is {noise:g}, more than {_MOST_NOISE:g} times the longest sum of an expected batch "
            f"of {batch_size:g}: steps are noise alone. Expected less noise or larger batches."
        )
    if not _CLIP_NORMS[0] <= clip_norm <= _CLIP_NORMS[1]:
        _warn(
            f"the clip norm is {clip_norm:g}, which no gradient comes near. Expected about the size of one example's "
            "gradient, such as 1: noise is the noise multiplier times the clip norm."
        )
    if getattr(mechanism.sampling, "rate", 1.0) == 0.0:
        _warn("the sampling rate is 0: every batch is empty, and steps are noise alone. Expected a rate above 0.")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
