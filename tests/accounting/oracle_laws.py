"""What one release does to the privacy loss, as quadrature nodes: losses, and the mass that Q puts on them.

Part of the accounting oracle, which shares no numerical code with `privet`. A pair of laws is two mixtures of
Gaussians of one width. Nothing is rounded to a grid of losses: the nodes are Gauss-Legendre nodes in x, the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
NEGLIGIBLE = 75.0  # log of how far below its largest value an integrand is left out
MOST_PANELS = 60_000
EDGE = 0.15  # width of a smooth cut between light and heavy losses, in units of the loss at the cut


class UndecidedError(ArithmeticError):
    """The integral did not settle within the work allowed."""


@dataclass(frozen=True)
class Law:
    """A mixture of N(shift, σ²); the weights are scaled to a sum of 1."""

    weights: tuple[float, ...]
    shifts: tuple[float, ...]

    def log_ratio(self, x, sigma):
        """Returns the log of its density over that of N(0, σ²), with its digits where that is near 0."""
        weights = np.array(self.weights) / sum(self.weights)
        shifts = np.array(self.shifts)
        if (shifts == 0.0).all():
            return np.zeros_like(x)
        exponents = (2.0 * np.multiply.outer(x, shifts) - shifts**2) / (2.0 * sigma**2)
        largest = exponents.max(axis=-1)
        near = np.log1p(np.maximum(np.expm1(np.minimum(exponents, 40.0)) @ weights, -1.0 + 1e-16))
        far = largest + np.log(np.exp(exponents - largest[..., None]) @ weights + 1e-320)
        return np.where(np.abs(exponents).max(axis=-1) < 30.0, near, far)


POINT = Law((1.0,), (0.0,))


@dataclass(frozen=True)
class Cut:
    """A smooth cut of the losses by their size: `part` says which of them count ("light", "heavy" or "all")."""

    loss: float
    part: str = "all"

    def log_weight(self, losses):
        """Returns the log of the share of a loss that counts."""
        if self.part == "all":
            return np.zeros_like(losses)
        distance = (np.abs(losses) / self.loss - 1.0) / EDGE
        return log_ndtr(-distance if self.part == "light" else distance)

    def of(self, part: str) -> Cut:
        return replace(self, part=part)


@dataclass(frozen=True)
class Pair:
    """P against Q, two mixtures of one σ. The loss is log(P/Q); it need not grow with x."""

    p: Law
    q: Law
    sigma: float

    def reversed(self) -> Pair:
        return Pair(self.q, self.p, self.sigma)

    def loss(self, x):
        return self.p.log_ratio(x, self.sigma) - self.q.log_ratio(x, self.sigma)

    def log_q(self, x):
        density = -((x / self.sigma) ** 2) / 2.0 - np.log(self.sigma * np.sqrt(2.0 * np.pi))
        return density + self.q.log_ratio(x, self.sigma)

    def nodes(self, tilt, frequency, cut=None):
        """Returns losses and logs of masses that integrate E_Q[e^(zL)] up to Re z = tilt, |Im z| = frequency."""
        x, log_width = _panels(self, tilt, frequency, cut, start=-np.inf)
        return self.loss(x), self.log_q(x) + log_width


@dataclass(frozen=True)
class Symmetric:
    """The symmetrised profile of a mixture at shift 2: what dominates batches of fixed size under replace-one.

    For ε >= 0 its δ is that of (1-q) N(0, σ²) + q N(2, σ²) against N(0, σ²), so positive losses have the law that they
    have there. The relation is symmetric, so -L under Q is L under P. What is left of the mass has loss 0.
    """

    rate: float
    sigma: float
    mixture: Pair = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixture", Pair(Law((1.0 - self.rate, self.rate), (0.0, 2.0)), POINT, self.sigma))

    def reversed(self) -> Symmetric:
        return self

    def nodes(self, tilt, frequency, cut=None):
        x, log_width = _panels(self.mixture, tilt, frequency, cut, start=1.0)  # the loss is 0 halfway between 0 and 2
        losses, mass = self.mixture.loss(x), self.mixture.log_q(x) + log_width
        return np.concatenate([losses, -losses]), np.concatenate([mass, mass + losses])


def _panels(pair, tilt, frequency, cut, *, start):
    """Returns Gauss-Legendre nodes in x, and the logs of their weights.

    Panels are so narrow that on each the exponent z L changes by a few units, and the density by less than its width.
    """
    keep = _region(pair, tilt, cut, start)
    table = np.linspace(*keep, 1501)
    losses = pair.loss(table)
    shifts = (*pair.p.shifts, *pair.q.shifts)
    spread = max(shifts) - min(shifts)
    slope = np.abs(np.gradient(losses, table))
    density = 1.0 / pair.sigma + spread / pair.sigma**2 + (abs(tilt) + frequency) * slope / 6.0
    if cut is not None:
        density = density + np.where(np.abs(np.abs(losses) / cut.loss - 1.0) < 8.0 * EDGE, slope / cut.loss / EDGE, 0.0)
    count = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2.0 * np.diff(table))])
    if count[-1] > MOST_PANELS:
        raise UndecidedError("too many panels")
    edges = np.interp(np.linspace(0.0, count[-1], int(np.ceil(count[-1])) + 4), count, table)
    half = np.diff(edges) / 2.0
    x = ((edges[1:] + edges[:-1]) / 2.0)[:, None] + half[:, None] * NODES
    return x.ravel(), np.log(half[:, None] * WEIGHTS).ravel()


@lru_cache(maxsize=4096)
def _region(pair, tilt, cut, start):
    """Returns the interval of x outside which nothing counts under Q, P, or Q tilted by e^(tilt L)."""
    ends = []
    for side in (min, max):
        p, q = side(pair.p.shifts), side(pair.q.shifts)
        spread = max(abs(p - q), 1e-300)
        steepest = min(max(tilt, 1.0), 600.0 * pair.sigma / spread)  # further out the table would be too coarse
        ends.append(side(p, q, q + steepest * (p - q)))
    low, high = max(ends[0] - 14.0 * pair.sigma, start), ends[1] + 14.0 * pair.sigma
    for _ in range(2):
        table = np.linspace(low, high, 1201)
        losses, log_q = pair.loss(table), pair.log_q(table)
        kept = np.zeros(len(table), dtype=bool)
        for each in (0.0, 1.0, tilt):
            exponents = log_q + each * losses
            if cut is not None:
                exponents = exponents + cut.log_weight(losses)
            kept |= exponents > exponents.max() - NEGLIGIBLE
        places = np.flatnonzero(kept)
        low, high = table[max(places[0] - 1, 0)], table[min(places[-1] + 1, len(table) - 1)]
    return float(low), float(high)


@dataclass(frozen=True)
class Step:
    """A mixture of pairs whose label the adversary sees, with the probability of each; what is left reveals nothing."""

    parts: tuple[tuple[float, Pair | Symmetric], ...]

    def reversed(self) -> Step:
        return Step(tuple((weight, part.reversed()) for weight, part in self.parts))

    def nodes(self, tilt, frequency, cut=None):
        """Returns losses and logs of Q's masses, for every tilt and frequency up to at least those given."""
        tilt = 2.0 ** math.ceil(math.log2(max(tilt, 2.0)))
        frequency = 2.0 ** (math.ceil(2.0 * math.log2(frequency)) / 2.0) if frequency > 0.0 else 0.0
        return _all_nodes(self, tilt, frequency, cut)


@lru_cache(maxsize=256)
def _all_nodes(step, tilt, frequency, cut):
    losses, logs = [], []
    for weight, part in step.parts:
        loss, mass = part.nodes(tilt, frequency, cut)
        losses.append(loss)
        logs.append(mass + math.log(weight))
    return np.concatenate(losses), np.concatenate(logs)


def step(part, weight=1.0) -> Step:
    return Step(((weight, part),))
