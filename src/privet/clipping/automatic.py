"""Automatic clipping: every gradient is normalised, whatever its size (AUTO-S, arXiv 2206.07136)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from privet._checks import check_positive
from privet.clipping.policy import ClippingPolicy
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Automatic"]

_LEAST = 1e-12  # above what the norm of a float32 gradient of 1e12 entries can lose to underflow
_MOST_WEIGHT = 1e18


@dataclass(frozen=True)
class Automatic(ClippingPolicy):
    """Weights `C / (norm + stability)` for one clip norm C over all parameters.

    Guarantees:
        One example moves the sum by less than `clip_norm`, for every finite gradient.

        =======================  ==========================================
        gradient                 weight
        =======================  ==========================================
        zero                     C / stability (times zero)
        subnormal, or underflow  C / stability at most
        large                    C / norm, rounded down
        NaN or infinite          dropped and counted by the caller
        stability below 1e-12    refused at construction
        =======================  ==========================================
    """

    clip_norm: float
    stability: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_positive("clip_norm", self.clip_norm))
        object.__setattr__(self, "stability", check_positive("stability", self.stability))
        if self.stability < _LEAST or self.clip_norm / self.stability > _MOST_WEIGHT:
            raise ConfigurationError(
                f"stability is {self.stability} for clip_norm {self.clip_norm}. Expected at least {_LEAST} and "
                f"clip_norm / stability at most {_MOST_WEIGHT}: a small gradient would be magnified beyond float32."
            )

    @property
    def sensitivity(self) -> float:
        """Returns the clip norm."""
        return self.clip_norm

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns one group for all."""
        return [0] * len(names)

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Returns `C / (norm + stability)`, for norms rounded up by eight units in the last place."""
        import torch

        slack = 1.0 + 8.0 * torch.finfo(squared_norms.dtype).eps
        return self.clip_norm / ((squared_norms.sqrt() + self.stability) * slack)

    def scaled(self, factor: float) -> Automatic:
        """Returns the policy with `factor` times the clip norm."""
        return replace(self, clip_norm=self.clip_norm * factor)
