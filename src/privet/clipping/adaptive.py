"""Adaptive clipping: the clip norm follows a quantile of the examples' norms (Andrew et al., arXiv 1905.03871)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from privet._checks import check_positive, check_probability
from privet.clipping.flat import scaled_down
from privet.clipping.policy import ClippingPolicy
from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adaptive"]

_SHARE = 5.0
"""Noise on the count, in noise multipliers, where none is given: the count then takes (2 x 5)^-2 of the privacy."""
_UP = 1.0 + 2.0**-48
"""What the gradient's noise is rounded up by, so that both releases together are no less private than declared."""
_RANGE = (1e-12, 1e12)


@dataclass(frozen=True)
class Adaptive(ClippingPolicy):
    """Weights `min(1, C / norm)` for a clip norm C that moves, after every logical step, towards a quantile of norms.

    How many norms were at most C is released with noise beside each gradient, and C follows from that alone:

        C <- C * exp(-learning_rate * (b - quantile)),   b = 1/2 + (sum_i (1[norm_i <= C] - 1/2) + noise) / m

    with the expected batch size m. Gradient and count together cost exactly what the declared noise multiplier z costs:
    the gradient's is `z_g = (z^-2 - (2 count_noise)^-2)^(-1/2)`, a little larger. (Algorithm 1 and theorem 1.)

    Attributes:
        clip_norm: the bound now; the first one, when the policy is made.
        quantile: the fraction of examples that C should leave as they are.
        learning_rate: how fast C moves: by at most about this fraction a step, up to noise.
        count_noise: the standard deviation of the noise on the count, in examples; it must be more than z / 2. By
            default 5 z, with which the gradient's noise is 0.5 % larger. The paper takes m / 20.

    Guarantees:
        One example moves the sum by at most `clip_norm`, and the count by at most 1/2. Edge cases as in `Flat`; an
        example whose norm is not finite is one above C. C stays between 1e-12 and 1e12.

    Example:
        >>> policy = Adaptive(clip_norm=1.0, quantile=0.5, learning_rate=0.2)
        >>> policy.after(fraction=0.5) == policy
        True
        >>> policy.after(fraction=1.0).clip_norm < 1.0
        True
    """

    clip_norm: float
    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None

    def __post_init__(self) -> None:
        given: object = self.clip_norm
        if isinstance(given, ClippingPolicy):
            raise ConfigurationError(
                f"clip_norm of Adaptive is the policy {given!r}. Expected one number: the first clip norm over all "
                "parameters. Bounds of several groups are not adapted; leave them fixed, or clip the whole gradient."
            )
        object.__setattr__(self, "clip_norm", check_positive("clip_norm", self.clip_norm))
        object.__setattr__(self, "learning_rate", check_positive("learning_rate", self.learning_rate))
        quantile = check_probability("quantile", self.quantile)
        if quantile in {0.0, 1.0}:
            raise ConfigurationError(
                f"quantile is {quantile:g}, which every clip norm is above or below, so that C would drift without an "
                "end. Expected a number between 0 and 1, such as 0.5."
            )
        object.__setattr__(self, "quantile", quantile)
        if self.count_noise is not None:
            object.__setattr__(self, "count_noise", check_positive("count_noise", self.count_noise))

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

    def split(self, multiplier: float) -> tuple[float, float]:
        """Returns the noise multiplier of the gradient, and the standard deviation of the noise on the count.

        Args:
            multiplier: the noise multiplier z of a single Gaussian that costs as much as both.

        Raises:
            ConfigurationError: if the count alone costs that much already.
        """
        count = _SHARE * multiplier if self.count_noise is None else self.count_noise
        if multiplier == 0.0:
            return 0.0, count
        if 2.0 * count <= multiplier:
            raise ConfigurationError(
                f"count_noise is {count:g} with a noise multiplier of {multiplier:g}: the count alone would cost more "
                f"than is declared. Expected more than {multiplier / 2.0:g}, the noise multiplier over 2. Give a "
                "twentieth of the expected batch size, or leave count_noise away."
            )
        return multiplier / math.sqrt(1.0 - (multiplier / (2.0 * count)) ** 2) * _UP, count

    def after(self, fraction: float) -> Adaptive:
        """Returns the policy of the next step, given the noisy fraction of norms that were at most the clip norm."""
        # Far more than the largest change of C in one step: noise alone must not overflow.
        change = max(-50.0, min(50.0, -self.learning_rate * (fraction - self.quantile)))
        return replace(self, clip_norm=min(max(self.clip_norm * math.exp(change), _RANGE[0]), _RANGE[1]))

    def scaled(self, factor: float) -> NoReturn:
        """Raises: the clip norm follows the count, and a schedule of it would undo that."""
        raise ConfigurationError(
            "a schedule of the clip norm was given with Adaptive, whose clip norm follows the norms of the examples. "
            "Expected one of the two. Schedule the noise or the rate, or clip with Flat."
        )
