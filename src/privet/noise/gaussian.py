"""The Gaussian mechanism: the one place where a clipped sum becomes a private gradient.

Guarantees
----------
A `PrivateGradient` is made here only, from a clipped sum that is consumed by it, with noise of standard deviation
multiplier x the sum's own sensitivity, once per logical step, at a step number that was never used before.

    case                                         result
    an empty batch                               the sum is zero, and gets noise like any other
    multiplier = 0                               the sum is released as it is: epsilon is infinite
    sensitivity NaN, or infinite with noise      refused before anything is touched
    the same sum, or an earlier step, again      refused
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, final

import torch
from torch import Tensor

from privet._checks import check_at_least, check_count
from privet.errors import ConfigurationError, ProtocolError
from privet.noise.source import NoiseSource, Offsets

if TYPE_CHECKING:
    from privet.gradients.clipped_sum import ClippedSum

__all__ = ["GaussianNoise", "NoiseMechanism", "PrivateGradient", "take_source"]

_SEAL = object()


@final
class PrivateGradient:
    """A noisy sum of clipped gradients: may be shown, divided, handed to an optimizer. Made by `GaussianNoise`."""

    __slots__ = ("__weakref__", "_std", "_step", "_values")

    def __init__(self, values: Mapping[str, Tensor], *, std: float, step: int, seal: object) -> None:
        if seal is not _SEAL:
            raise ProtocolError(
                "A PrivateGradient is made by the noise mechanism only: pass a clipped sum to GaussianNoise.release()."
            )
        self._values = dict(values)
        self._std = std
        self._step = step

    @property
    def values(self) -> dict[str, Tensor]:
        """Returns the noisy sums, by parameter name; not yet divided by the expected batch size."""
        return self._values

    @property
    def std(self) -> float:
        """Returns the standard deviation of the noise in every element; of its independent part where correlated."""
        return self._std

    @property
    def step(self) -> int:
        """Returns the number of the logical step."""
        return self._step

    def assembled(self, values: Mapping[str, Tensor]) -> PrivateGradient:
        """Returns the gradient of all ranks, where this one has the elements that one rank added noise to.

        `values` are such elements of all ranks, put together. Each rank's are private already.
        """
        return PrivateGradient(values, std=self._std, step=self._step, seal=_SEAL)

    def __reduce__(self) -> tuple[Any, ...]:
        raise ProtocolError("A PrivateGradient is not copied or pickled: use its values.")

    def __repr__(self) -> str:
        return f"PrivateGradient(step={self._step}, std={self._std:g}, parameters={len(self._values)})"


class NoiseMechanism(Protocol):
    """Whoever turns clipped sums into private gradients, one logical step after another; it may remember steps."""

    def release(
        self, clipped_sum: ClippedSum, *, multiplier: float, step: int, offsets: Offsets | None = None
    ) -> PrivateGradient:
        """Returns the private gradient of a logical step, and consumes the sum."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes after the saved step."""


@final
class GaussianNoise:
    """The Gaussian mechanism over one noise source, which no other mechanism may share."""

    def __init__(self, source: NoiseSource) -> None:
        take_source(source)
        self._source = source
        self._last_step = -1

    @property
    def source(self) -> NoiseSource:
        """Returns the noise source."""
        return self._source

    def release(
        self, clipped_sum: ClippedSum, *, multiplier: float, step: int, offsets: Offsets | None = None
    ) -> PrivateGradient:
        """Returns the private gradient of a logical step: the sum's own tensors, to which noise was added in place.

        `offsets` says where the shards that this process holds lie in their parameters.
        """
        std = self._std(clipped_sum, multiplier)
        check_count("step", step)
        if step <= self._last_step:
            raise ProtocolError(
                f"Step {step} comes after step {self._last_step}: its noise may have been used already."
            )
        values = clipped_sum.take()  # raises if it was taken before
        self._last_step = step  # before anything is drawn: whatever fails now, this step's noise is never drawn again
        self._source.add_many(values.items(), std=std, step=step, offsets=offsets)
        return PrivateGradient(values, std=std, step=step, seal=_SEAL)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, without any key."""
        return {"last_step": self._last_step, "source": self._source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes after the saved step: with a fresh key, unless the run is reproducible."""
        last_step = check_count("last_step", state["last_step"], least=-1)
        self._source.load_state_dict(state["source"])
        self._last_step = last_step

    @staticmethod
    def _std(clipped_sum: ClippedSum, multiplier: float) -> float:
        multiplier = check_at_least("noise multiplier", multiplier)
        sensitivity = clipped_sum.sensitivity
        if math.isnan(sensitivity) or sensitivity < 0.0:
            raise ConfigurationError(f"The sensitivity of a clipped sum must be 0 or more, got {sensitivity!r}.")
        if multiplier == 0.0:
            return 0.0
        std = multiplier * sensitivity
        for dtype in {value.dtype for value in clipped_sum.values.values()}:
            least, most = _representable(dtype)
            if not least <= std <= most and sensitivity > 0.0:
                raise ConfigurationError(
                    f"Noise of multiplier {multiplier:g} on a sensitivity of {sensitivity:g} has standard deviation "
                    f"{std:g}, which {dtype} cannot hold (it must lie in [{least:.1e}, {most:.1e}]): "
                    "choose a max_grad_norm that is finite and does not vanish."
                )
        return std


_TAKEN: weakref.WeakSet[Any] = weakref.WeakSet()


def take_source(source: NoiseSource) -> None:
    """Reserves a noise source for one mechanism.

    Raises:
        ProtocolError: if another one has it.
    """
    if source in _TAKEN:
        raise ProtocolError("This noise source already serves a mechanism; two would add the same noise to two sums.")
    _TAKEN.add(source)


def _representable(dtype: torch.dtype) -> tuple[float, float]:
    """Returns the standard deviations whose noise keeps its precision near zero and its tails below overflow."""
    limits = torch.finfo(dtype)
    return limits.tiny / limits.eps, limits.max / 64
