"""Per-sample adaptive clipping: normalisation that does not magnify small gradients (PSAC, arXiv 2212.00328)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from privet._checks import check_positive
from privet.clipping.policy import ClippingPolicy
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PSAC"]


@dataclass(frozen=True)
class PSAC(ClippingPolicy):
    """Weights `C / (norm + r / (norm + r))` for one clip norm C over all parameters and a stability r.

    The denominator is never below `2 sqrt(r) - r`, which bounds the weights.

    Guarantees:
        One example moves the sum by less than `clip_norm`, for every finite gradient.

        =======================  ==========================================
        gradient                 weight
        =======================  ==========================================
        zero                     C (times zero)
        subnormal, or underflow  about C
        large                    C / norm, rounded down
        NaN or infinite          dropped and counted by the caller
        r outside [1e-12, 1]     refused at construction
        =======================  ==========================================
    """

    clip_norm: float
    stability: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_positive("clip_norm", self.clip_norm))
        object.__setattr__(self, "stability", check_positive("stability", self.stability))
        if not 1e-12 <= self.stability <= 1.0 or self.clip_norm > 1e18:
            raise ConfigurationError(
                f"stability is {self.stability} and clip_norm {self.clip_norm}. Expected a stability from 1e-12 to 1 "
                "and a clip_norm of at most 1e18."
            )

    @property
    def sensitivity(self) -> float:
        """Returns the clip norm."""
        return self.clip_norm

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns one group for all."""
        return [0] * len(names)

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Returns `C / (norm + r / (norm + r))`, for norms rounded up by eight units in the last place."""
        import torch

        slack = 1.0 + 8.0 * torch.finfo(squared_norms.dtype).eps
        norms = squared_norms.sqrt()
        return self.clip_norm / ((norms + self.stability / (norms + self.stability)) * slack)

    def scaled(self, factor: float) -> PSAC:
        """Returns the policy with `factor` times the clip norm."""
        return replace(self, clip_norm=self.clip_norm * factor)
