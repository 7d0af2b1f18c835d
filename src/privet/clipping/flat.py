"""Flat clipping: the whole gradient of an example is scaled down to the clip norm (Abadi et al., arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from privet._checks import check_positive
from privet.clipping.policy import ClippingPolicy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Flat", "scaled_down"]


def scaled_down(squared_norms: Tensor, clip_norm: float) -> Tensor:
    """Returns `min(1, clip_norm / norm)`, for norms rounded up by four units in the last place."""
    import torch

    slack = 1.0 + 4.0 * torch.finfo(squared_norms.dtype).eps
    return (clip_norm / (squared_norms.sqrt() * slack)).clamp(max=1.0)


@dataclass(frozen=True)
class Flat(ClippingPolicy):
    """Weights `min(1, C / norm)` for one clip norm C over all parameters.

    Guarantees:
        One example moves the sum by at most `clip_norm`, for every finite gradient.

        =================  ==========================================
        gradient           weight
        =================  ==========================================
        zero               1 (times zero)
        subnormal          1
        norm above C       C / norm, rounded down
        NaN or infinite    dropped and counted by the caller
        C = 0, C = inf     refused at construction
        =================  ==========================================

    Example:
        >>> Flat(clip_norm=1.0).sensitivity
        1.0
    """

    clip_norm: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_norm", check_positive("clip_norm", self.clip_norm))

    @property
    def sensitivity(self) -> float:
        """Returns the clip norm."""
        return self.clip_norm

    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns one group for all."""
        return [0] * len(names)

    def weights(self, squared_norms: Tensor) -> Tensor:
        """Returns `min(1, C / norm)`."""
        return scaled_down(squared_norms, self.clip_norm)

    def scaled(self, factor: float) -> Flat:
        """Returns the policy with `factor` times the clip norm."""
        return replace(self, clip_norm=self.clip_norm * factor)
