"""Moments of the privacy loss by quadrature in x: where to look on the curve, and bounds that check the answer.

Nothing here knows of a grid of losses or of a Fourier transform. The trapezoid rule on the outcome x gives the
cumulant K(s) = log E_P[e^(sL)] of a composition, its mean K'(s) and its variance K''(s) under the tilt e^(sL). They
serve twice. The tilt that minimises Chernoff's bound is the saddle point at which `grid` composes. And Chebyshev's
inequality under the tilt is a lower bound on δ that owes nothing to the composition that it is held against.

Losses with a probability of at most `tail` are left out. Without that, rare and heavy losses decide K(s) at every s,
and the saddle point of a δ well above their probability is missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.accounting import _special as special
from privet.accounting.allocation import loss_law
from privet.accounting.blocks import block_size, refinement
from privet.accounting.pairs import Mixtures, mixtures
from privet.accounting.terms import ONE_DIRECTION, Pair, Part, Term

__all__ = ["Law", "Nodes", "laws", "rarest_epsilon_below"]

Array = NDArray[np.float64]
_MOST_NODES = 6000
_MOST_TERMS = 48  # a sketch of a composition with more terms than this takes every so many of them
_TILTS = np.exp2(np.arange(-14.0, 24.0))


@dataclass(frozen=True)
class Nodes:
    """One direction of one term: losses at the nodes, and the log of the mass that each stands for."""

    losses: Array
    logs: Array


def _nodes(pair: Mixtures, tail: float) -> tuple[Array, float]:
    """Returns the nodes and their distance; the loss is analytic in a strip of half-width πσ² around the real line."""
    low, high = pair.reach(tail)
    spacing = max(min(pair.sigma / 8.0, pair.sigma**2 / 2.0), (high - low) / _MOST_NODES)
    return np.arange(low, high + spacing, spacing), spacing


def _log_density(x: Array, weights: Array, shifts: Array, sigma: float) -> Array:
    with np.errstate(divide="ignore"):
        logs = np.log(weights)[:, None] - (x - shifts[:, None]) ** 2 / (2.0 * sigma**2)
    largest = logs.max(axis=0)
    density: Array = largest + np.log(np.exp(logs - largest).sum(axis=0)) - math.log(sigma * math.sqrt(2.0 * math.pi))
    return density


def _both_directions(term: Term, tail: float) -> tuple[Nodes, Nodes]:
    forward: list[tuple[Array, Array]] = []
    backward: list[tuple[Array, Array]] = []
    left = 1.0
    for weight, part in term.parts:
        left -= weight
        if part.pair is Pair.RARE:
            still = (np.zeros(1), np.array([math.log(weight) + math.log1p(-part.rate)]))
            forward.append(still)
            backward.append(still)
            continue
        if part.pair is Pair.ALLOCATION:
            law = loss_law(part.noise_multiplier, part.steps, tail)
            with np.errstate(divide="ignore"):
                logs = np.log(law.mass) + math.log(weight)
            forward.append((law.losses, logs + law.losses))
            backward.append((-law.losses, logs))
            continue
        pair = mixtures(part)
        x, spacing = _nodes(pair, tail)
        loss = pair.loss(x)
        scale = math.log(weight) + math.log(spacing)
        p = _log_density(x, pair.p_weights, pair.p_shifts, pair.sigma) + scale
        q = _log_density(x, pair.q_weights, pair.q_shifts, pair.sigma) + scale
        if part.pair is Pair.SYMMETRIC:
            both = _symmetrised(loss, p, q, weight)
            forward.append(both)
            backward.append(both)
        else:
            forward.append((loss, p))
            backward.append((-loss, q))
    if left > 1e-12:
        # What no part covers releases nothing.
        forward.append((np.zeros(1), np.array([math.log(left)])))
        backward.append(forward[-1])
    return _joined(forward), _joined(backward)


def _symmetrised(loss: Array, p: Array, q: Array, weight: float) -> tuple[Array, Array]:
    """Returns P on the positive losses, Q mirrored on the negative ones, and what is left at loss 0."""
    positive = loss > 0.0
    rest = max(weight - float(np.exp(p[positive]).sum() + np.exp(q[positive]).sum()), 1e-300)
    losses = np.concatenate([loss[positive], -loss[positive], [0.0]])
    return losses, np.concatenate([p[positive], q[positive], [math.log(rest)]])


def _joined(parts: list[tuple[Array, Array]]) -> Nodes:
    if len(parts) == 1:
        return Nodes(*parts[0])
    return Nodes(np.concatenate([each[0] for each in parts]), np.concatenate([each[1] for each in parts]))


class Law:
    """One direction of a composition, by the moments of its loss under a tilt."""

    def __init__(self, nodes: list[Nodes], counts: list[float], steps: int, sizes: list[int]) -> None:
        width = max(len(each.losses) for each in nodes)
        self._losses = np.zeros((len(nodes), width))
        self._logs = np.full((len(nodes), width), -np.inf)
        for row, each in enumerate(nodes):
            self._losses[row, : len(each.losses)] = each.losses
            self._logs[row, : len(each.logs)] = each.logs
        self.counts = np.array(counts)
        self.steps = steps
        self._refinements = np.array([refinement(size) for size in sizes], dtype=np.float64)

    def cumulant(self, tilt: float) -> float:
        """Returns K(s), all steps together."""
        exponents = self._logs + tilt * self._losses
        largest = exponents.max(axis=1)
        sums = np.exp(exponents - largest[:, None]).sum(axis=1)
        return float(self.counts @ (largest + np.log(sums)))

    def moments(self, tilt: float) -> tuple[float, float, float]:
        """Returns K(s), the mean and the variance of the loss under the tilt, all steps together."""
        exponents = self._logs + tilt * self._losses
        largest = exponents.max(axis=1)
        weights = np.exp(exponents - largest[:, None])
        sums = weights.sum(axis=1)
        mean = (weights * self._losses).sum(axis=1) / sums
        variance = (weights * (self._losses - mean[:, None]) ** 2).sum(axis=1) / sums
        return (
            float(self.counts @ (largest + np.log(sums))),
            float(self.counts @ mean),
            float(self.counts @ variance),
        )

    def steepness(self, tilt: float) -> float:
        """Returns one over the deviation of the loss under the tilt."""
        return 1.0 / math.sqrt(self.moments(tilt)[2] + 1e-300)

    def added(self, tilt: float, spacings: Array, *, finest: Array) -> Array:
        """Returns what a grid of each spacing adds to the variance of the tilted loss, dots connected.

        A loss at the share u of its cell is moved to the cell's ends with mean nearly kept: variance h² u (1 - u).
        Steps in blocks lie on a finer grid; the blocks, and the steps that fill none, add h²/6 each.

        Args:
            tilt: The tilt.
            spacings: The spacings asked about.
            finest: For each spacing, how many times finer the grid of a block may be; 1 where there are no blocks.
        """
        exponents = self._logs + tilt * self._losses
        weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        weights *= (self.counts / weights.sum(axis=1))[:, None]
        found = []
        for spacing, most in zip(spacings, finest, strict=True):
            finer = np.minimum(self._refinements, max(float(most), 1.0))
            sizes = np.where(finer > 1.0, finer**2, 1.0)
            whole = np.where(sizes > 1.0, self.counts / sizes + sizes / 2.0, 0.0).sum()
            fine = (spacing / finer)[:, None]
            share = np.abs(self._losses) / fine
            share -= np.floor(share)
            found.append(float((weights * share * (1.0 - share) * fine**2).sum()) + whole * float(spacing) ** 2 / 6.0)
        return np.array(found)

    @property
    def finest(self) -> float:
        """How many times finer than the grid the finest blocks lie."""
        return float(self._refinements.max())

    def epsilon(self, delta: float) -> tuple[float, float]:
        """Returns ε at δ by the best tilt, and that tilt: the saddle point of the question.

        Canonne, Kamath and Steinke, arXiv 2004.00010, proposition 12, for the order s + 1.
        """
        log_delta = math.log(delta)
        return _least(lambda s: (self.cumulant(s) - log_delta - math.log1p(s)) / s - math.log1p(1.0 / s))

    def log_delta(self, epsilon: float) -> tuple[float, float]:
        """Returns log δ at ε by the best tilt, and that tilt: the same proposition, solved for δ."""
        return _least(lambda s: self.cumulant(s) - s * (epsilon + math.log1p(1.0 / s)) - math.log1p(s))

    def jump(self, delta: float) -> tuple[float, float]:
        """Returns the ε at which one step alone decides δ, and how steeply log δ falls there.

        With losses that are rare and heavy, δ(ε) is about Σ over steps of E[(1 - e^(ε - loss))+]. Each step's part is
        a lower bound on δ; their sum is close to it only where two such losses in one run do not count.
        """
        low, high = 0.0, float(self._losses.max())
        if self.jump_delta(0.0)[0] <= delta:
            return 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.jump_delta(middle)[0] > delta else (low, middle)
        return high, self.jump_delta(high)[1]

    def jump_delta(self, epsilon: float) -> tuple[float, float]:
        """Returns Σ over steps of E[(1 - e^(ε - loss))+], and how steeply its log falls."""
        masses = np.exp(self._logs) * self.counts[:, None]
        gap = np.minimum(epsilon - self._losses, 0.0)
        falling = float((masses * np.where(gap < 0.0, np.exp(gap), 0.0)).sum())
        delta = float((masses * -np.expm1(gap)).sum())
        return delta, falling / delta if delta > 0.0 else 1.0

    def split(self, delta: float, epsilon: float) -> tuple[float, float] | None:
        """Returns (a loss, a tilt): above that loss steps are rare, and those below it do not decide δ at ε.

        The steps below it are bounded by Chernoff, best at that tilt: they must not count for more than 0.3 % of δ.
        None if there is no such loss.
        """
        masses = np.exp(self._logs)
        for share in (3.0, 5.0, 8.0, 13.0):
            above = self._losses > epsilon / share
            chances = (masses * above).sum(axis=1)
            # A step with a rare loss is given a usual one as well, which has to be next to nothing.
            if float(self.counts @ chances) > 10.0 or float(chances.max()) > 1e-4 * min(1.0, epsilon):
                return None
            small = np.where(above, -np.inf, self._logs)
            tilts = np.exp2(np.arange(-2.0, 14.0)) / epsilon
            exponents = small[None] + tilts[:, None, None] * self._losses
            largest = exponents.max(axis=2)
            sums = largest + np.log(np.exp(exponents - largest[..., None]).sum(axis=2))
            chernoff = sums @ self.counts - tilts * epsilon - np.log1p(tilts) - tilts * np.log1p(1.0 / tilts)
            if float(chernoff.min()) < math.log(delta * 3e-3):
                return epsilon / share, float(tilts[int(chernoff.argmin())])
        return None

    def expected_above(self, loss: float, tilt: float) -> float:
        """Returns how many steps are expected to have a loss above `loss` under the tilt."""
        exponents = self._logs + tilt * self._losses
        weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
        shares = (weights * (self._losses > loss)).sum(axis=1) / weights.sum(axis=1)
        return float(self.counts @ shares)

    def epsilon_below(self, delta: float, tilt: float) -> float:
        """Returns an ε that the composition needs at least, at δ: Chebyshev's inequality under several tilts.

        With m and v the tilted mean and variance, L lies in m ± c√v with probability at least 1 - 1/c² under the tilt,
        hence P(L > a) >= e^(K(s) - s b) (1 - 1/c²) for a = m - c√v, b = m + c√v; and δ(ε) >= P(L > a) (1 - e^(ε - a)).
        """
        best = 0.0
        for factor in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            s = tilt * factor
            total, mean, variance = self.moments(s)
            for c in (1.25, 1.6, 2.5):
                reach = c * math.sqrt(max(variance, 0.0))
                # The quadrature is exact to about 1e-9 a step at its cut ends; 2 % is left for them.
                log_chance = total - s * (mean + reach) + math.log1p(-1.0 / c**2) - 0.02
                if log_chance > math.log(delta):
                    best = max(best, mean - reach + math.log(-math.expm1(math.log(delta) - log_chance)))
        return best


def _least(objective: Callable[[float], float]) -> tuple[float, float]:
    """Returns (least value, its argument) of a function that falls and then rises over s > 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = []
        for tilt in _TILTS:
            value = objective(float(tilt))
            values.append(value if math.isfinite(value) else math.inf)
            if len(values) > 4 and values[-1] > values[-2] > values[-3]:
                break
        best = int(np.argmin(values))
        low, high = math.log(_TILTS[max(best - 1, 0)]), math.log(_TILTS[min(best + 1, len(values) - 1)])
        found = (values[best], float(_TILTS[best]))
        golden = (math.sqrt(5.0) - 1.0) / 2.0
        for _ in range(14):
            left, right = high - golden * (high - low), low + golden * (high - low)
            at_left, at_right = objective(math.exp(left)), objective(math.exp(right))
            found = min(found, (at_left, math.exp(left)), (at_right, math.exp(right)))
            low, high = (low, right) if at_left <= at_right else (left, high)
    return found


def laws(counts: Mapping[Term, int], tail: float, *, sketch: bool = True) -> tuple[Law, ...]:
    """Returns the law of each direction; one where the two are the same.

    With many terms the law is a sketch: a sample of them, each counted for those it stands for. A sketch says where to
    look, and bounds nothing.
    """
    items = list(counts.items())
    steps = sum(counts.values())
    if sketch and len(items) > _MOST_TERMS:
        items = items[:: -(-len(items) // _MOST_TERMS)]
    share = steps / sum(count for _, count in items)
    both = [_both_directions(term, tail) for term, _ in items]
    scaled = [count * share for _, count in items]
    sizes = [block_size(count) for _, count in items]
    forward = Law([each[0] for each in both], scaled, steps, sizes)
    if all(part.pair in ONE_DIRECTION for term, _ in items for _, part in term.parts):
        return (forward,)
    return forward, Law([each[1] for each in both], scaled, steps, sizes)


def rarest_epsilon_below(counts: Mapping[Term, int], delta: float) -> float:
    """Returns an ε that is needed at least: the test "some step of this term has a loss above a", for each term alone.

    With p and q the probabilities of one loss above a, the test separates 1 - (1-p)^n from 1 - (1-q)^n. Their exact
    values come from Φ; no composition is involved.
    """
    best = 0.0
    for term, count in counts.items():
        weight, part = term.parts[0]
        if part.pair is Pair.RARE:
            continue
        tail = max(delta / count * 1e-3, 1e-300)
        one, other = _largest_above(part, tail) if part.pair is Pair.ALLOCATION else _above(part, tail)
        p = -np.expm1(count * np.log1p(-np.minimum(weight * one, 1.0 - 1e-16)))
        q = -np.expm1(count * np.log1p(-np.minimum(weight * other, 1.0 - 1e-16)))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            needed = np.log((p * (1.0 - 1e-9) - delta) / q) - 1e-9
        needed = needed[np.isfinite(needed)]
        best = max(best, float(needed.max(initial=0.0)))
    return best


def _above(part: Part, tail: float) -> tuple[Array, Array]:
    """Returns under either law the probability of a loss above each of some losses that are above 0."""
    pair = mixtures(part)
    x = np.linspace(*pair.reach(tail), 129)
    x = x[pair.loss(x) > 0.0]
    p: Array = pair.p_weights @ special.ndtr((pair.p_shifts[:, None] - x) / pair.sigma)
    q: Array = pair.q_weights @ special.ndtr((pair.q_shifts[:, None] - x) / pair.sigma)
    return p, q


def _largest_above(part: Part, tail: float) -> tuple[Array, Array]:
    """Returns the same for random allocation with the largest of the sums of all steps in the place of the loss."""
    sigma = part.noise_multiplier
    x = np.linspace(0.0, 1.0 - sigma * float(special.ndtri(tail)), 129)
    others = (part.steps - 1) * special.log_ndtr(x / sigma)
    p: Array = -np.expm1(others + special.log_ndtr((x - 1.0) / sigma))
    q: Array = -np.expm1(others + special.log_ndtr(x / sigma))
    return p, q
