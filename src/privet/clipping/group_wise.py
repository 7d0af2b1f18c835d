"""Group-wise clipping: each group of parameters, chosen by the user, has a bound of its own (arXiv 2212.01539)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from privet._checks import check_positive
from privet.clipping.flat import scaled_down
from privet.clipping.policy import ClippingPolicy
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GroupWise"]


@dataclass(frozen=True)
class GroupWise(ClippingPolicy):
    """Weights `min(1, C_k / norm_k)` for each group k of parameters.

    `clip_norms` holds each group's bound and `members` its parameters, by name; every trainable parameter belongs to
    exactly one group.

    Guarantees:
        One example moves the sum by at most `sqrt(sum_k C_k^2)`. Edge cases of each group as in `Flat`.

        =============================  ==========================================
        groups                         outcome
        =============================  ==========================================
        a parameter in none or in two  refused
        a name that is no parameter    refused
        an empty group, or none        refused at construction
        =============================  ==========================================

    Example:
        >>> GroupWise({"a": 0.3, "b": 0.4}, {"a": ["0.weight"], "b": ["0.bias", "1.weight"]}).sensitivity
        0.5
    """

    clip_norms: Mapping[str, float]
    members: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        if not self.clip_norms or set(self.clip_norms) != set(self.members):
            raise ConfigurationError(
                f"clip_norms names the groups {sorted(self.clip_norms)} and members {sorted(self.members)}. "
                "Expected the same groups in both, and at least one."
            )
        bounds = {k: check_positive(f"clip_norm of {k!r}", c) for k, c in self.clip_norms.items()}
        members = {k: tuple(self.members[k]) for k in bounds}
        named = [name for group in members.values() for name in group]
        if len(set(named)) != len(named) or not all(members.values()):
            raise ConfigurationError(f"members is {members}. Expected no empty group and no parameter named twice.")
        object.__setattr__(self, "clip_norms", MappingProxyType(bounds))
        object.__setattr__(self, "members", MappingProxyType(members))

    def __reduce__(self) -> tuple[Any, ...]:  # for copies and other processes: pickle knows no frozen mapping
        return type(self), (dict(self.clip_norms), dict(self.members))

    @property
    def sensitivity(self) -> float:
        """Returns the root of the sum of the squared bounds."""
        return math.hypot(*self.clip_norms.values())

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns the number of each parameter's group."""
        group_of = {name: k for k, group in enumerate(self.members.values()) for name in group}
        if set(group_of) != set(names):
            raise ConfigurationError(
                f"members of GroupWise lacks the parameters {sorted(set(names) - set(group_of))} and names "
                f"{sorted(set(group_of) - set(names))}, which are not trainable. Expected each trainable one once."
            )
        return [group_of[name] for name in names]

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Returns each group's `min(1, C_k / norm_k)`."""
        import torch

        return torch.stack([scaled_down(n, c) for n, c in zip(squared_norms, self.clip_norms.values(), strict=True)])

    def scaled(self, factor: float) -> GroupWise:
        """Returns the policy with `factor` times every clip norm."""
        return replace(self, clip_norms={k: c * factor for k, c in self.clip_norms.items()})
