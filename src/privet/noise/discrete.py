"""Noise on an integer grid: the sum is rounded to it, and gets discrete Gaussian noise that is drawn exactly.

All that is released is a whole number of grid steps γ, a power of two that follows from the standard deviation alone:

    γ = 2^e     with standard deviation / γ in [2^40, 2^41);     s = ceil(standard deviation / γ), a whole number

    case                                          result
    a value of 2^61 γ or more, NaN, infinity      refused before noise is drawn
    a standard deviation of 0                     refused: a grid without noise protects nothing
    float16, bfloat16, integers, complex          refused, as for all noise
    a sum on another device, any memory layout    rounded on the host, where noise is drawn; the result is copied back

Rounding to the nearest multiple of γ is exact in float64, since γ is a power of two. The sum and the noise are added as
integers. What follows, times γ and rounded to the type of the sum, is a function of that integer alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from privet._checks import check_at_least, check_count, check_positive
from privet.accounting.discrete import LEAST_SCALE, MOST_VALUES, DiscreteGaussianEvent
from privet.errors import ConfigurationError, ProtocolError
from privet.noise.counter import CounterNoise, parts_of
from privet.noise.description import Noise
from privet.noise.discrete_draw import CHUNK, DiscreteDraw
from privet.noise.discrete_law import DiscreteLaw
from privet.noise.gaussian import GaussianNoise, take_source
from privet.noise.source import NoiseSource, Offsets

__all__ = ["DiscreteGaussian", "DiscreteNoise"]

_SCALE_BITS = LEAST_SCALE.bit_length() - 1
_MOST_STEPS = 2.0**61
_LEAST_MULTIPLIER = 2.0**-10
_STDS = (2.0**-900, 2.0**900)
_ACCUMULATORS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class DiscreteGaussian(Noise):
    """Discrete Gaussian noise on a fine grid, which the sum is rounded to (Canonne et al., arXiv 2004.00010).

    It closes the attacks on noise that is added to floating-point numbers: all that is released are integers with noise
    whose law is exact. It costs about as much ε as `Gaussian`, and is drawn on the host.

    Attributes:
        multiplier: the standard deviation of the noise over the sensitivity of the clipped sum; at least 2^-10.
        sum_error: how far floating-point arithmetic may move the sums of two neighbors apart before they are rounded,
            over the sensitivity. It is billed as sensitivity. The default is generous for sums in float32 that are
            computed as usual, and is not proven for every model (docs/noise.md).

    Raises:
        ConfigurationError: for a multiplier of 0, or one that is too small for the grid.

    Example:
        >>> DiscreteGaussian(1.1).event.gaussian_multiplier > 1.098
        True
    """

    multiplier: float
    sum_error: float = 2.0**-10

    def __post_init__(self) -> None:
        multiplier = check_positive("noise multiplier of DiscreteGaussian", self.multiplier)
        if multiplier < _LEAST_MULTIPLIER:
            raise ConfigurationError(
                f"the noise multiplier is {multiplier:g}, and with so little noise sums of few examples leave the "
                f"integers of 64 bits. Expected at least {_LEAST_MULTIPLIER:g}. Give more noise, or Gaussian noise."
            )
        object.__setattr__(self, "multiplier", multiplier)
        object.__setattr__(self, "sum_error", check_at_least("sum_error", self.sum_error))

    @property
    def event(self) -> DiscreteGaussianEvent:
        """Returns the event of one release, before any amplification by sampling."""
        return DiscreteGaussianEvent(self.multiplier, self.sum_error)

    def with_multiplier(self, multiplier: float) -> DiscreteGaussian:
        """Returns noise of another size on the same kind of grid."""
        return replace(self, multiplier=multiplier)

    def mechanism(self, source: NoiseSource) -> GaussianNoise:
        """Returns the mechanism, which draws under the key of a source that nothing else may use."""
        return GaussianNoise(DiscreteNoise(source))


@final
class DiscreteNoise:
    """A noise source that rounds to the grid and adds integers, addressed by (key, step, parameter name, index).

    Args:
        source: whose key is used, for keys of its own that tell nothing of the noise of `source`.
    """

    def __init__(self, source: NoiseSource) -> None:
        if not isinstance(source, CounterNoise):
            raise ConfigurationError(
                f"discrete noise is drawn under the key of an addressed source, got {type(source).__name__}. Expected "
                "SecureNoise or DeviceNoise."
            )
        take_source(source)
        self._source = source
        self._law: DiscreteLaw | None = None
        self._draw = DiscreteDraw(source.key, purpose="noise.discrete")

    @property
    def secure(self) -> bool:
        """Returns True."""
        return True

    @property
    def predictable(self) -> bool:
        """Returns whether the run is reproducible, and so not private."""
        return self._source.predictable

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes with a fresh key, unless the run is reproducible."""
        self._source.load_state_dict(state)

    def add_many(
        self, tensors: Iterable[tuple[str, Tensor]], *, std: float, step: int, offsets: Offsets | None = None
    ) -> None:
        """Rounds every named tensor to the grid of `std`, and adds discrete noise of that size, in place.

        Raises:
            ConfigurationError: before any tensor is touched, where `std` is 0, or a tensor is not one that can be
                rounded.
        """
        named = [(name, tensor.detach()) for name, tensor in tensors]
        check_count("step", step)
        if std == 0.0:
            raise ConfigurationError(
                "the standard deviation of discrete noise is 0: a sum on a grid without noise protects nothing. "
                "Expected a noise multiplier and a sensitivity above 0. Use Gaussian for training without noise."
            )
        if not _STDS[0] <= std <= _STDS[1]:  # false of NaN
            raise ConfigurationError(
                f"the grid has no room for noise of standard deviation {std:g}. Give another clip norm."
            )
        spacing, law = self._grid(std)
        _refuse(named, spacing)
        parts = [
            (name, part, check_count(f"offset of {name!r}", offset))
            for name, tensor in named
            for part, offset in parts_of(tensor, name, (offsets or {}).get(name, 0))
        ]
        for name, part, offset in parts:
            flat = part.contiguous().view(-1)
            for start in range(0, flat.numel(), CHUNK):
                values = flat[start : start + CHUNK]
                noise = self._draw.values(law, len(values), step=step, name=name, start=offset + start)
                steps = values.to("cpu", torch.float64).mul_(1.0 / spacing).round_().to(torch.int64)
                values.copy_(steps.add_(torch.from_numpy(noise)).to(torch.float64).mul_(spacing))
            if flat.data_ptr() != part.data_ptr():
                part.copy_(flat.view(part.shape))

    def _grid(self, std: float) -> tuple[float, DiscreteLaw]:
        """Returns the spacing of the grid and the law of the noise on it."""
        spacing = 2.0 ** (math.frexp(std)[1] - 1 - _SCALE_BITS)
        scale = math.ceil(std / spacing)  # the quotient is exact
        if self._law is None or self._law.scale != scale:
            self._law = DiscreteLaw(scale)
        return spacing, self._law


def _refuse(named: list[tuple[str, Tensor]], spacing: float) -> None:
    """Raises if a tensor has not the type or the values of a sum that can be rounded. No value is told."""
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise ConfigurationError("a name is given twice: both tensors would get the same noise.")
    if sum(tensor.numel() for _, tensor in named) > MOST_VALUES:
        raise ConfigurationError(f"more than {MOST_VALUES} values are released together. Expected at most so many.")
    for name, tensor in named:
        if tensor.dtype not in _ACCUMULATORS:
            raise ConfigurationError(
                f"noise for {name!r} must be added to float32 or float64, got {tensor.dtype}: accumulate the clipped "
                "sum in float32, and round after the noise."
            )
        # `not <` is true of NaN as well.
        if tensor.numel() and not float(tensor.abs().max()) < _MOST_STEPS * spacing:
            raise ProtocolError(
                f"the clipped sum of {name!r} has a value that the grid cannot hold: it is not finite, or beyond 2^20 "
                "standard deviations of the noise. Expected a sum of fewer examples for so little noise. Use larger "
                "noise, smaller batches, or Gaussian noise. Nothing was released."
            )
