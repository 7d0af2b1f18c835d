"""Per-layer clipping: every layer's part of the gradient has a bound of its own (McMahan et al., arXiv 1710.06963)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from privet._checks import check_positive
from privet.clipping.flat import scaled_down
from privet.clipping.policy import ClippingPolicy
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PerLayer"]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class PerLayer(ClippingPolicy):
    """Weights `min(1, C_k / norm_k)` for each layer k, a layer being the module that holds the parameter.

    `clip_norm` is either one number, the bound of the whole, shared out equally (`C / sqrt(K)` each), or a mapping
    from the path of each layer that has trainable parameters to its own bound.

    Guarantees:
        One example moves the sum by at most `sqrt(sum_k C_k^2)`. Edge cases as in `Flat`.

    Example:
        >>> PerLayer({"body": 0.3, "head": 0.4}).sensitivity
        0.5
    """

    clip_norm: float | Mapping[str, float]

    def __post_init__(self) -> None:
        if isinstance(self.clip_norm, Mapping):
            if not self.clip_norm:
                raise ConfigurationError("clip_norm names no layer. Expected a bound for each layer.")
            bounds = {layer: check_positive(f"clip_norm of {layer!r}", c) for layer, c in self.clip_norm.items()}
            object.__setattr__(self, "clip_norm", MappingProxyType(bounds))
        else:
            object.__setattr__(self, "clip_norm", check_positive("clip_norm", self.clip_norm))

    def __reduce__(self) -> tuple[Any, ...]:  # for copies and other processes: pickle knows no frozen mapping
        bounds = self.clip_norm
        return type(self), (dict(bounds) if isinstance(bounds, Mapping) else bounds,)

    @property
    def sensitivity(self) -> float:
        """Returns the root of the sum of the squared bounds."""
        if isinstance(self.clip_norm, Mapping):
            return math.hypot(*self.clip_norm.values())
        return self.clip_norm

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns the number of each parameter's layer."""
        layers = list(dict.fromkeys(_layer(name) for name in names))
        if isinstance(self.clip_norm, Mapping):
            if set(layers) != set(self.clip_norm):
                missing = sorted(set(layers) - set(self.clip_norm))
                unknown = sorted(set(self.clip_norm) - set(layers))
                raise ConfigurationError(
                    f"clip_norm of PerLayer lacks the layers {missing} and names {unknown}, which have no trainable "
                    f"parameters. Expected exactly: {sorted(layers)}."
                )
            layers = list(self.clip_norm)
        return [layers.index(_layer(name)) for name in names]

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Returns each layer's `min(1, C_k / norm_k)`."""
        if not isinstance(self.clip_norm, Mapping):
            return scaled_down(squared_norms, self.clip_norm / math.sqrt(squared_norms.shape[0]))
        import torch

        rows = [scaled_down(n, c) for n, c in zip(squared_norms, self.clip_norm.values(), strict=True)]
        return torch.stack(rows)

    def scaled(self, factor: float) -> PerLayer:
        """Returns the policy with `factor` times every clip norm."""
        if isinstance(self.clip_norm, Mapping):
            return PerLayer({layer: c * factor for layer, c in self.clip_norm.items()})
        return PerLayer(self.clip_norm * factor)
