"""Where a policy's answers are taken, and checked before anything rests on them: groups, sensitivity and weights.

The policies of `privet.clipping` are proven by their formulas, and tested. Those of a user's own are checked each time,
at the price of looking at values, for which an accelerator has to be waited for.

Axes: B examples, K clipping groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from privet._checks import check_positive
from privet.clipping.table import is_proven
from privet.errors import ConfigurationError
from privet.gradients.precision import eps_in_force
from privet.gradients.tracing import tracing

__all__ = ["Policy", "groups_of", "magnification_of", "sensitivity_of", "weights_of"]

_LEAST = torch.finfo(torch.float32).tiny
"""A weight below this has lost its digits, and may have been rounded up to twice itself: the unit is dropped."""

_SMALL = 2.0**-40
"""A sensitivity below this is too near to the smallest numbers of float32 for sums of its size."""

_ROUNDING = 1e-5  # of the sensitivity, for a formula evaluated in float32


class Policy(Protocol):
    """What the sum needs of a clipping policy (`privet.clipping.ClippingPolicy`)."""

    @property
    def sensitivity(self) -> float:
        """Returns how far one example can move the sum."""

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns the clipping group of each parameter."""

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Returns every example's weight in each group."""


def groups_of(policy: Policy, names: Sequence[str]) -> list[int]:
    """Returns the group of each parameter.

    Raises:
        ConfigurationError: if it is not one whole number for each, from 0 to K - 1.
    """
    groups = list(policy.groups(names))
    given: list[object] = [*groups]
    whole = all(isinstance(group, int) and group >= 0 for group in given)
    if len(groups) != len(names) or not whole or set(groups) != set(range(len(set(groups)))):
        raise ConfigurationError(
            f"{type(policy).__name__}.groups returned {groups} for {len(names)} parameters. Expected a group for each, "
            "numbered from 0 without a gap."
        )
    return groups


def sensitivity_of(policy: Policy) -> float:
    """Returns the policy's sensitivity, if it is a finite number above 0."""
    return check_positive(f"sensitivity of {type(policy).__name__}", policy.sensitivity)


def magnification_of(sensitivity: float) -> float:
    """Returns a power of two by which weights are multiplied, and sums divided in the end: 1 but for tiny clip norms.

    Weights and gradients that are both tiny would lose their digits on the way to a sum, some of them upward.
    """
    return 1.0 if sensitivity >= _SMALL else 2.0 ** -math.floor(math.log2(sensitivity))


def weights_of(
    policy: Policy, squared: Tensor, absent: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:  # (K, B), (B,) bool -> (K, B), (B,) bool
    """Returns the weights, zero for units to be left out, and which these are: None where it is known that none is.

    They are left out if they are dropped, or absent from the start. Where products round their operands
    (TF32, bfloat16), all weights are a little smaller than the policy's.

    Guarantees:
        Whatever the policy, no unit that is kept moves the sum further than its sensitivity, up to rounding: the run
        stops here, before anything of the batch is released.

        ===============================  ===================================================
        of a unit that is not dropped    outcome
        ===============================  ===================================================
        weight negative, NaN, infinite   ConfigurationError
        weight zero                      ConfigurationError: it would be left out in silence
        weight positive, below 1.2e-38   dropped: it has lost its digits
        moves the sum too far            ConfigurationError
        another shape, or no tensor      ConfigurationError
        the same in a traced graph       dropped: a graph cannot raise
        ===============================  ===================================================
    """
    if absent is None and squared.is_cpu and is_proven(policy) and not tracing():
        weights = policy.weights(squared)  # zero for an infinite norm, NaN for NaN
        if not weights.numel() or float(weights.min()) >= _LEAST:
            return _for_products(weights), None
    return _checked(policy, squared, absent)


def _checked(
    policy: Policy, squared: Tensor, absent: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # (K, B), (B,) bool -> (K, B), (B,) bool
    """Returns weights and units to be left out where nothing is known of either; see `weights_of`."""
    dropped = ~squared.isfinite().all(0)
    if absent is not None:
        dropped = dropped | absent
    kept = squared.masked_fill(dropped, 0.0)
    weights: object = policy.weights(kept)
    if not isinstance(weights, Tensor) or weights.shape != squared.shape or not weights.is_floating_point():
        found = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ConfigurationError(
            f"{type(policy).__name__}.weights returned {found}. Expected one floating point number for each example "
            f"in each of {squared.shape[0]} groups, of shape {tuple(squared.shape)}. Nothing was released."
        )
    if not is_proven(policy):
        dropped = dropped | _wrong(policy, kept, weights, dropped)
    dropped = dropped | (weights < _LEAST).any(0)
    if squared.is_cpu and not tracing() and not bool(dropped.any()):
        return _for_products(weights), None
    return _for_products(weights.masked_fill(dropped, 0.0)), dropped


def _for_products(weights: Tensor) -> Tensor:
    """Returns the weights, made smaller where a product may round both of its operands up."""
    taken = eps_in_force(torch.float32, weights.device)
    return weights * (1.0 - taken) ** 2 if taken else weights


def _wrong(policy: Policy, squared: Tensor, weights: Tensor, dropped: Tensor) -> Tensor:  # (B,) bool
    """Returns which units that are not dropped a traced graph has to drop, and raises outside of one."""
    positive = ((weights > 0.0) & weights.isfinite()).all(0) | dropped
    moved = torch.linalg.vector_norm(weights * squared.sqrt(), dim=0)
    bounded = (moved <= sensitivity_of(policy) * (1.0 + _ROUNDING)) | dropped
    wrong: Tensor = ~(positive & bounded)
    if not tracing() and bool(wrong.any()):
        what = (
            "a weight that is negative, zero, nan or infinite"
            if not bool(positive.all())
            else f"weights that let an example move the sum further than its sensitivity of {policy.sensitivity:g}"
        )
        raise ConfigurationError(
            f"{type(policy).__name__}.weights returned {what}. Expected finite weights above 0 with "
            "sqrt(sum_k weights_k^2 * squared_norms_k) at most the sensitivity, for every example. Nothing was "
            "released. Mend the policy; privet.clipping.Flat is one that holds."
        )
    return wrong
