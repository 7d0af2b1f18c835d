"""The matrix C that correlates the noise of steps, by its first column, and how far one example moves C x.

Releases X + C⁻¹ Z, with rows for steps and Z independent Gaussian, tell as much as C X + Z. An example that takes part
in the steps of a set π moves C X by at most ‖Σ_{t in π} C e_t‖ clip norms, since C has no negative entry. Gradients may
depend on what was released before: C is lower triangular (Denisov et al., arXiv 2202.08312, theorem 2.1).

For a first column that is nonnegative and does not increase, the worst of all sets of k steps that are at least b
apart is 0, b, 2b, ..., (k - 1) b (Kalinin and Lampert, arXiv 2405.13763, theorem 2).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privet._checks import check_count
from privet.errors import ConfigurationError

__all__ = ["Toeplitz"]

_MOST_BLOCKS = 10**6  # beyond it every further block is counted as the limit of all blocks
_SLACK = 1.0 + 1e-12  # what the rounding of the sums below could take away


@dataclass(frozen=True)
class Toeplitz:
    """A lower triangular matrix with one number on each diagonal: the `coefficients`, then Σ_j scales_j decays_j^(t-1).

    Attributes:
        coefficients: the first numbers of the first column, from the main diagonal on. They are nonnegative and do not
            increase. There is one of them, equal to 1, where there are decays.
        scales: the weight of each decay, above 0, together at most 1.
        decays: each in (0, 1). Without decays every further number of the column is 0, and the matrix has as many
            bands as coefficients.

    Raises:
        ConfigurationError: for numbers that are not such.
    """

    coefficients: tuple[float, ...] = (1.0,)
    scales: tuple[float, ...] = ()
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("coefficients", "scales", "decays"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        column = self.coefficients
        if not column or column[0] <= 0.0 or any(after > before for before, after in itertools.pairwise(column)):
            raise ConfigurationError(
                f"coefficients must be nonnegative numbers that do not increase, the first above 0, got {column}. "
                "Otherwise the sensitivity that is billed is not the largest one."
            )
        if len(self.scales) != len(self.decays):
            raise ConfigurationError(f"each decay has one scale, got {len(self.scales)} for {len(self.decays)} decays.")
        if self.decays and column != (1.0,):
            raise ConfigurationError(f"coefficients must be (1.0,) where there are decays, got {column}.")
        if any(not 0.0 < decay < 1.0 for decay in self.decays) or any(scale <= 0.0 for scale in self.scales):
            raise ConfigurationError(
                f"decays must lie between 0 and 1 and scales above 0, got the decays {self.decays} and the scales "
                f"{self.scales}."
            )
        if sum(self.scales) > 1.0:
            raise ConfigurationError(f"scales must add up to at most 1, got {self.scales}: the column would increase.")

    @property
    def bands(self) -> int | None:
        """Returns the number of diagonals that are not 0, or None where there are decays: then there is no last one."""
        return None if self.decays else len(self.coefficients)

    @property
    def squared_norm(self) -> float:
        """Returns the squared norm of the whole first column, as if there were no last step."""
        if not self.decays:
            return math.fsum(each * each for each in self.coefficients)
        scales, decays = np.array(self.scales), np.array(self.decays)
        return 1.0 + float(scales @ (1.0 / (1.0 - np.outer(decays, decays))) @ scales)

    def column(self, steps: int) -> npt.NDArray[np.float64]:  # (steps,)
        """Returns the first column of the matrix of so many steps."""
        found = np.zeros(steps)
        known = self.coefficients[:steps]
        found[: len(known)] = known
        for scale, decay in zip(self.scales, self.decays, strict=True):
            found[1:] += scale * np.exp(np.arange(steps - 1) * math.log(decay))
        return found

    def squared_sensitivity(self, participations: int, separation: int) -> float:
        """Returns ‖Σ_{i < k} C e_{ib}‖² over ‖C e_0‖², in k b steps: an upper bound but for rounding it away.

        So it is 1 for one participation, at most, and k where the matrix has no more than b bands.
        """
        check_count("participations", participations)
        return _squared_sensitivity(self, participations, check_count("separation", separation, 1))


@functools.lru_cache(maxsize=4096)
def _squared_sensitivity(matrix: Toeplitz, participations: int, separation: int) -> float:
    if participations == 0:
        return 0.0
    if matrix.bands is not None and matrix.bands <= separation:
        return float(participations)  # the columns do not overlap
    blocks = min(participations, _MOST_BLOCKS)
    squares = (_banded if matrix.bands is not None else _decaying)(matrix, blocks, separation)
    # The block sums rise, so that the last one bounds those that were not computed.
    limit = squares[-1] if participations == blocks else _limit(matrix, separation)
    return (math.fsum(squares) + (participations - blocks) * limit) / matrix.squared_norm * _SLACK


def _banded(matrix: Toeplitz, blocks: int, separation: int) -> npt.NDArray[np.float64]:  # (blocks,)
    """Returns the squared norm of each block of `separation` rows of the sum of the columns 0, b, 2b, ..."""
    filled = min(-(-len(matrix.coefficients) // separation), blocks)
    rows = matrix.column(filled * separation).reshape(filled, separation)
    squares = np.square(np.cumsum(rows, axis=0)).sum(axis=1)
    return np.concatenate([squares, np.full(blocks - filled, squares[-1])])


def _decaying(matrix: Toeplitz, blocks: int, separation: int) -> npt.NDArray[np.float64]:  # (blocks,)
    """Returns the same where the column decays, from geometric sums.

    Row r >= 1 of block m is Σ_j s_j λ_j^(r-1) (1 + λ_j^b + ... + λ_j^(mb)); row 0 has the 1 of the new column, and the
    tails of the earlier ones.
    """
    scales, logs = np.array(matrix.scales), np.log(matrix.decays)
    index = np.arange(blocks)[:, None]
    whole = -np.expm1(separation * logs)
    heights = scales * -np.expm1((index + 1) * separation * logs) / whole  # (blocks, decays)
    tops = 1.0 + (scales * np.exp((separation - 1) * logs) * -np.expm1(index * separation * logs) / whole).sum(axis=1)
    pairs = logs[:, None] + logs[None, :]
    rows = np.expm1((separation - 1) * pairs) / np.expm1(pairs)
    return np.asarray(np.square(tops) + np.einsum("mi,ij,mj->m", heights, rows, heights))


def _limit(matrix: Toeplitz, separation: int) -> float:
    """Returns what the squared norm of a block comes near to, after many participations."""
    if matrix.bands is not None:
        filled = -(-len(matrix.coefficients) // separation)
        return float(_banded(matrix, filled, separation)[-1])
    logs = np.log(matrix.decays)
    enough = int(min(10**6, 1 + 40.0 / float(separation * -logs.max())))
    return float(_decaying(matrix, enough + 1, separation)[-1]) * (1.0 + 1e-9)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name} must be a sequence of numbers, got {values!r}.") from None
    if not all(math.isfinite(value) and value >= 0.0 for value in found):
        raise ConfigurationError(f"{name} must be finite numbers of at least 0, got {found}.")
    return found
