"""The table of the library's own policies: each has one line, with its name at the paper's door.

A policy of the table is proven by its formula, and tested. Any other has its weights checked in every batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from privet.clipping.adaptive import Adaptive
from privet.clipping.automatic import Automatic
from privet.clipping.flat import Flat
from privet.clipping.group_wise import GroupWise
from privet.clipping.per_layer import PerLayer
from privet.clipping.policy import ClippingPolicy
from privet.clipping.psac import PSAC
from privet.errors import ConfigurationError

__all__ = ["is_proven", "policy_for"]

_TABLE: dict[type[ClippingPolicy], str | None] = {
    Flat: "flat",
    PerLayer: "per_layer",
    Automatic: "automatic",
    PSAC: "psac",
    Adaptive: "adaptive",
    GroupWise: None,  # it needs more than a clip norm: only as an object
}


def is_proven(policy: object) -> bool:
    """Returns whether the policy is one of the table itself: a subclass may do as it likes."""
    return type(policy) in _TABLE


def policy_for(clipping: str | ClippingPolicy, max_grad_norm: float | Mapping[str, float] | None) -> ClippingPolicy:
    """Returns the policy that is meant: one of the table by its name and clip norm, or the object itself.

    Raises:
        ConfigurationError: if the name is unknown, the clip norm is missing, or it contradicts the policy's own.
    """
    if isinstance(clipping, ClippingPolicy):
        if max_grad_norm is not None and max_grad_norm != clipping.sensitivity:
            raise ConfigurationError(
                f"max_grad_norm is {max_grad_norm!r}, and the clipping policy's sensitivity is {clipping.sensitivity}. "
                "Expected the same number: a clip norm has one home. Leave max_grad_norm away."
            )
        return clipping
    names = {name: kind for kind, name in _TABLE.items() if name is not None}
    given: object = clipping
    if not isinstance(given, str) or given not in names:
        raise ConfigurationError(f"clipping must be one of {', '.join(map(repr, names))}, got {clipping!r}.")
    kind = names[given]
    if max_grad_norm is None:
        raise ConfigurationError(
            f"max_grad_norm is missing, and clipping={clipping!r} has no clip norm without it. Give a number, such as "
            "max_grad_norm=1.0."
        )
    bounds: object = max_grad_norm
    if isinstance(bounds, list | tuple):
        raise ConfigurationError(
            f"max_grad_norm is a {type(bounds).__name__} of {len(bounds)}. Expected one number; or, with "
            "clipping='per_layer', a mapping from the path of each layer to its bound, such as {'features.0': 0.5}."
        )
    if isinstance(max_grad_norm, Mapping) and kind is not PerLayer:
        raise ConfigurationError(f"max_grad_norm maps layers to bounds. Expected one number for clipping={clipping!r}.")
    return kind(max_grad_norm)  # type: ignore[call-arg]  # every policy that has a name takes its clip norm first
