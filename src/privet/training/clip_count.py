"""Adaptive clipping in a step: the noisy count goes through the same release as the gradient, as one more element.

The count is scaled by `unit = z_g C / s`, with the gradient's noise multiplier z_g and the count's noise s. Then noise
of standard deviation z_g C on all elements is noise of s on the count. Sum and scaled count together have sensitivity
`sqrt(C^2 + (unit / 2)^2) = C z_g / z`: what is released is one Gaussian of the declared multiplier z. It is drawn from
the key of the step under a name of its own, and added up over ranks like any sum. (Andrew et al., arXiv 1905.03871,
theorem 1.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from privet.clipping import Adaptive, ClippingPolicy
from privet.errors import ConfigurationError
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.spread import Spread
from privet.mechanism import Mechanism

__all__ = ["adapted", "counted", "refuse_adaptive", "resumed"]

_COUNT = ".clip_count"  # no parameter has a name that begins with a dot


def refuse_adaptive(policy: ClippingPolicy, spread: Spread, *, compiled: bool = False) -> None:
    """Raises ConfigurationError where a clip norm that moves cannot be used."""
    if not isinstance(policy, Adaptive):
        return
    if compiled:
        raise ConfigurationError(
            "clipping=Adaptive(...) changes the clip norm in every step, and compile=True makes a graph for one clip "
            "norm. Expected compile=False with Adaptive, or a fixed clip norm such as Flat's."
        )
    if spread.collective:
        raise ConfigurationError(
            "clipping=Adaptive(...) counts norms on one process or on replicas, and this model is sharded over ranks. "
            "Expected a fixed clip norm, such as Flat's, for a sharded model."
        )


def counted(clipped: ClippedSum, mechanism: Mechanism) -> ClippedSum:
    """Returns the sum with the recentred count of its norms beside it, where the policy is adaptive."""
    policy = mechanism.clipping
    if not isinstance(policy, Adaptive):
        return clipped
    multiplier = mechanism.noise.multiplier
    gradient, _ = policy.split(multiplier)
    joint = clipped.sensitivity * (gradient / multiplier if multiplier else 1.0)
    count = _recentred(clipped.statistics["norms"][0], policy.clip_norm) * _unit(policy, multiplier)
    return ClippedSum({**clipped.take(), _COUNT: count.reshape(1)}, joint, clipped.statistics)


def adapted(values: dict[str, Tensor], mechanism: Mechanism, *, expected: Callable[[], float]) -> Mechanism:
    """Takes the noisy count out of released values, and returns the mechanism of the next step.

    Args:
        values: what was released, by name.
        mechanism: that of the step.
        expected: returns the expected batch size, a public number.
    """
    policy = mechanism.clipping
    if not isinstance(policy, Adaptive):
        return mechanism
    noisy = float(values.pop(_COUNT)) / _unit(policy, mechanism.noise.multiplier)
    return replace(mechanism, clipping=policy.after(noisy / expected() + 0.5))


def resumed(mechanism: Mechanism, state: Mapping[str, Any]) -> Mechanism:
    """Returns the mechanism with the clip norm that a saved run had come to, where the policy is adaptive."""
    policy = mechanism.clipping
    if not isinstance(policy, Adaptive):
        return mechanism
    return replace(mechanism, clipping=replace(policy, clip_norm=float(state["clip_norm"])))


def _recentred(squared_norms: Tensor, clip_norm: float) -> Tensor:  # (B,) -> ()
    """Returns how many norms are at most the clip norm, less half of all: one example moves it by 1/2."""
    within = (squared_norms.sqrt() <= clip_norm).sum()  # NaN is not
    # In double precision: float32 would round a count of many examples by more than its noise is made for.
    wide = torch.float32 if squared_norms.device.type == "mps" else torch.float64
    return within.to(wide) - 0.5 * len(squared_norms)


def _unit(policy: Adaptive, multiplier: float) -> float:
    """Returns what one example in the count becomes, so that the gradient's noise fits it."""
    gradient, count = policy.split(multiplier)
    return gradient * policy.clip_norm / count if multiplier else 1.0
