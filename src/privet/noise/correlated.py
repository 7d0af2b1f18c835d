"""Correlated noise: later steps take back a part of the noise of earlier ones, so that their sum is less noisy.

The clipped sums x_t of a run, in units of their sensitivity, are released as X + C⁻¹ Z. C is lower triangular, with
one number on each diagonal and a first column of norm 1; Z is independent Gaussian. With C = I this is `Gaussian`.
What it costs depends on when an example takes part again, so that the sampling must keep those steps apart.

    noise        C                                      beside the model                      source
    BandMF       `coefficients` on its first diagonals  one buffer less than coefficients     arXiv 2306.08153
    BLT          1, then Σ_j s_j λ_j^(t-1)              one buffer for each decay             arXiv 2404.16706
    LambdaCGD    λ^t; C⁻¹ = 1, -λ                       nothing: the last row is drawn again  arXiv 2601.22334
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, final, runtime_checkable

from privet._checks import check_at_least, check_count
from privet.accounting.correlated import CorrelatedRelease
from privet.accounting.toeplitz import Toeplitz
from privet.errors import ConfigurationError
from privet.noise.counter import CounterNoise
from privet.noise.description import Noise
from privet.noise.gaussian import GaussianNoise, PrivateGradient, take_source
from privet.noise.recursion import CorrelatedSource
from privet.noise.source import NoiseSource, Offsets

if TYPE_CHECKING:
    from privet.gradients.clipped_sum import ClippedSum

__all__ = ["BLT", "BandMF", "Correlated", "CorrelatedNoise", "LambdaCGD", "Remembering"]


@runtime_checkable
class Remembering(Protocol):
    """A noise mechanism whose noise of a step depends on that of earlier steps."""

    def begin_anew(self) -> None:
        """Makes the noise of the next step independent of all before it."""


@final
class CorrelatedNoise:
    """The mechanism of correlated noise over one noise source, which no other mechanism may share.

    It is the Gaussian mechanism over a source with a memory. Noise is in units of the clipped sum's sensitivity, so
    that a clip norm may change from step to step. A change of the multiplier begins the correlation anew.
    """

    def __init__(self, source: NoiseSource, matrix: Toeplitz, *, most_bytes: int | None = None) -> None:
        if not isinstance(source, CounterNoise):
            raise ConfigurationError(
                f"correlated noise is drawn from an addressed source, got {type(source).__name__}. Expected "
                "SecureNoise or DeviceNoise, whose earlier values can be drawn again."
            )
        take_source(source)
        self._source = CorrelatedSource(source, matrix, most_bytes=most_bytes)
        self._inner = GaussianNoise(self._source)
        self._multiplier: float | None = None

    @property
    def source(self) -> CorrelatedSource:
        """Returns the source with the memory."""
        return self._source

    def begin_anew(self) -> None:
        """Makes the noise of the next step independent of all before it. No cost is saved or added by it."""
        self._source.begin_anew()

    def release(
        self, clipped_sum: ClippedSum, *, multiplier: float, step: int, offsets: Offsets | None = None
    ) -> PrivateGradient:
        """Returns the private gradient of a logical step, and consumes the sum. See `GaussianNoise.release`."""
        if multiplier != self._multiplier:
            self.begin_anew()
            self._multiplier = multiplier
        return self._inner.release(clipped_sum, multiplier=multiplier, step=step, offsets=offsets)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: neither a key nor a buffer."""
        return {**self._inner.state_dict(), "multiplier": self._multiplier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes: a reproducible run goes on with its correlation, any other begins a new one under a fresh key."""
        self._inner.load_state_dict(state)
        self._multiplier = state["multiplier"]


class Correlated(Noise):
    """A correlated noise, as a frozen description. A subclass gives the matrix C up to a factor."""

    most_bytes: int | None

    @property
    @abstractmethod
    def matrix(self) -> Toeplitz:
        """Returns C up to a factor: the multiplier is for a first column of norm 1."""

    @property
    @final
    def event(self) -> CorrelatedRelease:
        """Returns the event of one release, which a sampling turns into one with a finite ε."""
        matrix = self.matrix
        return CorrelatedRelease(self.multiplier, matrix.coefficients, matrix.scales, matrix.decays)

    @final
    def with_multiplier(self, multiplier: float) -> Self:
        """Returns noise of another size with the same correlation."""
        return replace(self, multiplier=multiplier)  # type: ignore[type-var]  # every subclass is a dataclass

    @final
    def mechanism(self, source: NoiseSource) -> CorrelatedNoise:
        """Returns the mechanism over a source that nothing else may use."""
        return CorrelatedNoise(source, self.matrix, most_bytes=self.most_bytes)

    def _check(self) -> None:
        object.__setattr__(self, "multiplier", check_at_least("noise multiplier", self.multiplier))
        if self.most_bytes is not None:
            object.__setattr__(self, "most_bytes", check_count("most_bytes", self.most_bytes))
        _ = self.matrix


@dataclass(frozen=True)
class BandMF(Correlated):
    """Correlated noise whose C has as many diagonals as `coefficients` (Choquette-Choo et al., arXiv 2306.08153).

    Attributes:
        multiplier: the standard deviation of the independent noise over the sensitivity of one participation.
        coefficients: the first column of C, from the main diagonal on, up to a factor. They are nonnegative and do not
            increase. `privet.noise.optimized_bands` finds the best ones.
        most_bytes: the most that buffers may take in each process; there is one buffer less than coefficients, each as
            large as the private parameters that the process holds, in their precision but at least float32. Where they
            would take more, noise is drawn again: step t of a correlation then draws t + 1 times. By default there is
            no limit.

    Example:
        >>> BandMF(1.1, coefficients=(1.0, 0.5)).event.matrix.bands
        2
    """

    multiplier: float
    coefficients: tuple[float, ...]
    most_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", self.matrix.coefficients)
        self._check()

    @property
    def matrix(self) -> Toeplitz:
        """Returns C up to a factor."""
        return Toeplitz(self.coefficients)


@dataclass(frozen=True)
class BLT(Correlated):
    """Correlated noise from a buffered linear Toeplitz matrix, c_t = Σ_j s_j λ_j^(t-1) (arXiv 2404.16706, 2408.08868).

    Attributes:
        multiplier: the standard deviation of the independent noise over the sensitivity of one participation.
        scales: s_j > 0, together at most 1.
        decays: λ_j in (0, 1). Two to five do for most runs. `privet.noise.optimized_decays` finds the best ones.
        most_bytes: as for `BandMF`; there is one buffer for each decay.

    Example:
        >>> BLT(1.1, scales=(0.3, 0.1), decays=(0.7, 0.99)).matrix.bands is None
        True
    """

    multiplier: float
    scales: tuple[float, ...]
    decays: tuple[float, ...]
    most_bytes: int | None = None

    def __post_init__(self) -> None:
        matrix = self.matrix
        if not matrix.decays:
            raise ConfigurationError("BLT needs a decay at least. Expected scales and decays, such as (0.3,), (0.9,).")
        object.__setattr__(self, "scales", matrix.scales)
        object.__setattr__(self, "decays", matrix.decays)
        self._check()

    @property
    def matrix(self) -> Toeplitz:
        """Returns C up to a factor."""
        return Toeplitz((1.0,), self.scales, self.decays)


@dataclass(frozen=True)
class LambdaCGD(Correlated):
    """Each step takes back `decay` times the independent noise of the step before: C⁻¹ = I - λS (arXiv 2601.22334).

    It keeps nothing beside the model: the row of the step before is drawn again, so that a step draws twice.

    Attributes:
        multiplier: the standard deviation of the independent noise over the sensitivity of one participation.
        decay: λ in (0, 1). `privet.noise.optimized_decay` finds the best one.

    Example:
        >>> LambdaCGD(1.1, decay=0.5).matrix.column(3).tolist()
        [1.0, 0.5, 0.25]
    """

    multiplier: float
    decay: float

    def __post_init__(self) -> None:
        self._check()

    @property
    def most_bytes(self) -> None:  # type: ignore[override]
        """Returns None: there are no buffers."""

    @property
    def matrix(self) -> Toeplitz:
        """Returns C up to a factor: the powers of the decay."""
        return Toeplitz((1.0,), (self.decay,), (self.decay,))
