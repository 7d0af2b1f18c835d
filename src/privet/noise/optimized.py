"""The best coefficients of correlated noise for a run: how many steps, participations, and what the optimizer does.

The loss is a smooth function of few numbers with a derivative in closed form, and is minimised by L-BFGS-B. What is
returned is checked against the definition, with whole matrices and nothing of the search, and against no correlation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from privet._checks import check_count
from privet.accounting.toeplitz import Toeplitz
from privet.errors import AccountingError
from privet.noise.correlated import BLT, BandMF, Correlated, LambdaCGD
from privet.noise.workload import Participation, Workload, expected_loss, loss_and_slope

__all__ = ["Optimized", "dense_loss", "optimized_bands", "optimized_decay", "optimized_decays"]

N = TypeVar("N", bound=Correlated)
Floats = npt.NDArray[np.float64]
_MOST_DENSE = 1024


@dataclass(frozen=True)
class Optimized(Generic[N]):
    """A noise with the certificate of its loss.

    Attributes:
        noise: with a multiplier of 1; `noise.with_multiplier` sizes it.
        loss: sens(C) x root mean square error over the run. At the same ε, errors are smaller by loss / identity_loss.
        identity_loss: the loss of independent noise.
        certified: whether the loss was computed again from whole matrices; above 1024 steps it was not.
    """

    noise: N
    loss: float
    identity_loss: float
    certified: bool


def optimized_bands(
    bands: int,
    *,
    steps: int,
    participations: int = 1,
    separation: int | None = None,
    workload: Workload | None = None,
) -> Optimized[BandMF]:
    """Returns `BandMF` noise whose coefficients have the least loss, in seconds.

    Args:
        bands: the number of coefficients. With b bands, b - 1 buffers are kept.
        steps: of the whole run.
        participations: of one example.
        separation: the steps between two of them, such as the batches of a pass.
        workload: what the optimizer does; by default plain gradient descent at a constant rate.

    Raises:
        ConfigurationError: for numbers that do not fit together.

    Example:
        >>> found = optimized_bands(4, steps=64)
        >>> found.loss < 0.6 * found.identity_loss
        True
    """
    run, work = _checked(steps, participations, separation, workload)
    bands = min(check_count("bands", bands, 1), steps)

    def column_of(drops: Floats) -> Floats:
        # Nonnegative drops from each coefficient to the next: exactly the columns whose sensitivity is known.
        column = np.zeros(steps)
        column[:bands] = np.cumsum(drops[::-1])[::-1]
        return column

    def aim(drops: Floats) -> tuple[float, Floats]:
        loss, slope = loss_and_slope(column_of(drops), run, work)
        return math.log(loss), np.cumsum(slope[:bands]) / loss

    start = -np.diff(_square_root(bands), append=0.0)
    bounds = [(0.0, None)] * (bands - 1) + [(1e-9, None)]
    column = column_of(_least(aim, start, bounds))[:bands]
    return _certified(BandMF(1.0, tuple((column / column[0]).tolist())), run, work)


def optimized_decays(
    count: int,
    *,
    steps: int,
    participations: int = 1,
    separation: int | None = None,
    workload: Workload | None = None,
) -> Optimized[BLT]:
    """Returns `BLT` noise with `count` decays of the least loss found. Arguments are those of `optimized_bands`.

    Example:
        >>> found = optimized_decays(2, steps=64)
        >>> len(found.noise.decays)
        2
    """
    run, work = _checked(steps, participations, separation, workload)
    count, powers = check_count("count", count, 1), np.arange(steps - 1)

    def numbers(place: Floats) -> tuple[Floats, Floats]:
        return np.exp(place[:count]), 1.0 / (1.0 + np.exp(-place[count:]))

    def aim(place: Floats) -> tuple[float, Floats]:
        scales, decays = numbers(place)
        tails = np.exp(np.log(decays)[:, None] * powers)
        column = np.concatenate([[1.0], scales @ tails])
        loss, slope = loss_and_slope(column, run, work)
        by_scale = tails @ slope[1:] * scales
        by_decay = (tails * powers) @ slope[1:] * scales * (1.0 - decays)
        return math.log(loss), np.concatenate([by_scale, by_decay]) / loss

    # Decays that forget after 2, ..., steps steps, evenly in the logarithm, and scales like those of a square root.
    memory = np.geomspace(3.0, max(4.0, steps / 1.5), count) if count > 1 else np.array([max(4.0, steps**0.7)])
    weights = memory**-0.5
    start = np.concatenate([np.log(0.45 * weights / weights.sum()), np.log(memory - 1.0)])
    bounds = [(-20.0, -0.01 - math.log(count))] * count + [(-6.0, 16.0)] * count
    scales, decays = numbers(_least(aim, start, bounds))
    order = np.argsort(decays)
    return _certified(BLT(1.0, tuple(scales[order].tolist()), tuple(decays[order].tolist())), run, work)


def optimized_decay(
    *,
    steps: int,
    participations: int = 1,
    separation: int | None = None,
    workload: Workload | None = None,
) -> Optimized[LambdaCGD]:
    """Returns `LambdaCGD` noise with the decay of the least loss. Arguments are those of `optimized_bands`.

    Example:
        >>> 0.9 < optimized_decay(steps=1000).noise.decay < 0.99
        True
    """
    run, work = _checked(steps, participations, separation, workload)
    powers = np.arange(steps)

    def aim(place: Floats) -> tuple[float, Floats]:
        decay = float(1.0 / (1.0 + np.exp(-place[0])))
        column = np.exp(powers * math.log(decay))
        loss, slope = loss_and_slope(column, run, work)
        return math.log(loss), np.array([float((powers * column) @ slope) * (1.0 - decay) / loss])

    found = _least(aim, np.array([1.0]), [(-8.0, 14.0)])
    return _certified(LambdaCGD(1.0, float(1.0 / (1.0 + np.exp(-found[0])))), run, work)


def dense_loss(matrix: Toeplitz, participation: Participation, workload: Workload | None = None) -> float:
    """Returns the loss by its definition, with whole matrices: slow, and nothing of it is shared with the search."""
    workload, steps = Workload() if workload is None else workload, participation.steps
    column = matrix.column(steps)
    lags = np.subtract.outer(np.arange(steps), np.arange(steps))
    below = lags >= 0
    correlation = np.where(below, column[np.maximum(lags, 0)], 0.0)
    momentum = np.where(below, workload.momentum ** np.maximum(lags, 0), 0.0)
    rates = np.array(workload.learning_rates or (1.0,) * steps)
    rates /= math.sqrt(float(np.mean(rates**2)))
    sums = np.cumsum(rates[:, None] * momentum, axis=0)
    errors = np.linalg.solve(correlation.T, sums.T).T
    places = np.arange(participation.participations) * (participation.separation or 1)
    moved = correlation[:, places].sum(axis=1)
    return math.sqrt(float(moved @ moved) * float(np.sum(errors**2)) / steps)


def _checked(
    steps: int, participations: int, separation: int | None, workload: Workload | None
) -> tuple[Participation, Workload]:
    run, work = Participation(steps, participations, separation), Workload() if workload is None else workload
    work.for_steps(steps)
    return run, work


def _square_root(bands: int) -> Floats:
    """Returns the first coefficients of the square root of the matrix of prefix sums: a start (arXiv 2202.11205)."""
    index = np.arange(1, bands)
    return np.concatenate([[1.0], np.cumprod((2.0 * index - 1.0) / (2.0 * index))])


def _least(
    aim: Callable[[Floats], tuple[float, Floats]], start: Floats, bounds: Sequence[tuple[float, float | None]]
) -> Floats:
    """Returns where a function, given with its derivative, is least."""
    from scipy.optimize import minimize  # slow to import, and only wanted here

    found = minimize(
        aim, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500, "ftol": 1e-11, "gtol": 1e-8}
    )
    return np.asarray(found.x, dtype=np.float64)


def _certified(noise: N, run: Participation, work: Workload) -> Optimized[N]:
    loss, identity = expected_loss(noise.matrix, run, work), expected_loss(Toeplitz(), run, work)
    if not loss <= identity * (1.0 + 1e-9):
        raise AccountingError(
            f"{noise} has a loss of {loss:g}, and independent noise {identity:g}: for this run correlation does not "
            "help. Use Gaussian noise."
        )
    if run.steps > _MOST_DENSE:
        return Optimized(noise, loss, identity, certified=False)
    dense = dense_loss(noise.matrix, run, work)
    if not math.isclose(dense, loss, rel_tol=1e-6):
        raise AccountingError(f"the loss of {noise} is {dense:g} by its definition, and the search says {loss:g}.")
    return Optimized(noise, loss, identity, certified=True)
