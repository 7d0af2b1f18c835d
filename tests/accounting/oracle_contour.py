"""δ(ε) of a composition by contour integration: no grid of losses, no Fourier transform on a lattice.

With M(z) = E_Q[(P/Q)^z], multiplied over all releases, and any c > 1,

    δ(ε) = E_P[(1 - e^(ε - L))_+] = (1 / 2πi) ∫_{Re z = c} M(z) e^(-(z-1)ε) / (z (z-1)) dz,

since ∫_0^∞ (1 - e^-u) e^(-su) du = 1 / (s (s+1)), and E_P[e^(sL)] = M(s+1). The line goes through the saddle point.

Where losses are rare and heavy, M hardly falls along the line: it stays near the probability that nothing heavy
happens. Then each release's M is split smoothly into light and heavy losses. All-light paths are integrated on a line
of their own (far to the right, where they cost next to nothing); what is left, M^T - M_light^T, falls quickly.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from oracle_laws import NODES, WEIGHTS, Cut, UndecidedError

WORK = [5e8]  # products spent on one line before the oracle gives up; see `patience`
TOLERANCE = 1e-7
NOTHING = 1e-25  # a δ that is taken as [0, bound]
CUTS = (0.35, 0.17, 0.08, 0.04, 0.02)  # in units of ε


@contextmanager
def patience(work):
    """Lets one δ cost up to `work` products inside the block."""
    WORK.append(work)
    try:
        yield
    finally:
        WORK.pop()


@dataclass(frozen=True)
class Composition:
    """All releases: the squared shift of what was not sampled, and the sampled steps with their counts."""

    squared_mu: float = 0.0
    steps: tuple = ()

    def reversed(self):
        return Composition(self.squared_mu, tuple((step.reversed(), count) for step, count in self.steps))


class Line:
    """The composed M along Re z = c, relative to its value at t = 0. With a cut, M of the light losses alone."""

    def __init__(self, composition, c, cut=None, *, heavy=False):
        self.composition, self.c, self.cut, self.heavy = composition, c, cut, heavy
        self.work = 0.0
        self.log_at_zero, self.variance = composition.squared_mu * c * (c - 1.0) / 2.0, composition.squared_mu
        self.log_ratio = 0.0  # of the whole M to that of the light losses, at t = 0
        self._logs = []
        for step, count in composition.steps:
            log_moment, variance = self._real(step, count)
            self._logs.append(log_moment)
            self.log_at_zero += count * log_moment
            self.variance += count * variance
        self.counts = sum(count for _, count in composition.steps)

    def _real(self, step, count):
        """Returns log M(c) of a step, and the variance of the loss under the tilt."""
        c, cut = self.c, self.cut
        if cut is None:
            losses, mass = step.nodes(c, 0.0)
            centred = float(np.exp(np.minimum(mass, 600.0)) @ (_expm1(c * losses) - c * _expm1(losses)))
        else:
            heavy = cut.of("heavy")
            losses, mass = step.nodes(0.0, 0.0, heavy)
            outside = float(np.exp(mass + heavy.log_weight(losses)).sum())
            losses, mass = step.nodes(c, 0.0, cut.of("light"))
            mass = mass + cut.of("light").log_weight(losses)
            centred = float(np.exp(mass) @ _expm1(c * losses)) - outside
        log_moment = _log_sum(mass + c * losses)
        if log_moment < 300.0 and math.isfinite(centred):
            log_moment = math.log1p(max(centred, -1.0 + 1e-15))
        tilted = np.exp(mass + c * losses - log_moment)
        mean = float(tilted @ losses)
        if self.heavy:
            far, far_mass = step.nodes(c, 0.0, heavy)
            log_heavy = _log_sum(far_mass + heavy.log_weight(far) + c * far)
            self.log_ratio += count * float(np.logaddexp(0.0, log_heavy - log_moment))
        return log_moment, max(float(tilted @ losses**2) - mean**2, 0.0)

    def log_pole(self, epsilon):
        return -(self.c - 1.0) * epsilon - math.log(self.c) - math.log(self.c - 1.0)

    def log_integrand(self, epsilon):
        """Returns the log of the integrand at t = 0: of M, or of M less the light losses' M."""
        ratio = self.log_ratio
        value = self.log_at_zero + self.log_pole(epsilon)
        if not self.heavy:
            return value
        return value + (ratio if ratio > 30.0 else math.log(max(math.expm1(ratio), 1e-300)))

    def chernoff(self, epsilon):
        """Returns an upper bound on δ: (1 - e^-u)_+ <= e^(su) for every s > 0."""
        return math.exp(min(self.log_at_zero - (self.c - 1.0) * epsilon, 0.0))

    def logs(self, centres, offsets):
        """Returns log M(c + it) / M(c) at t = centre + offset, and the log of the ratio of the whole M to it."""
        t = centres[:, None] + offsets
        z = self.c + 1j * t
        logs = self.composition.squared_mu * (z * (z - 1.0) - self.c * (self.c - 1.0)) / 2.0
        ratios = np.zeros_like(logs)
        for (step, count), log_moment in zip(self.composition.steps, self._logs, strict=True):
            cut = self.cut and self.cut.of("all" if self.heavy else "light")
            losses, mass = step.nodes(self.c, float(t.max()), cut)
            exponents = mass + self.c * losses - log_moment
            columns = [exponents if cut is None else exponents + self.cut.of("light").log_weight(losses)]
            if self.heavy:
                columns.append(exponents + self.cut.of("heavy").log_weight(losses))
            used = np.max(columns, axis=0) > -60.0
            self.work += t.size * int(used.sum())
            if self.work > WORK[-1]:
                raise UndecidedError("too much work")
            near, *far = _transform(centres, offsets, losses[used], [np.exp(column[used]) for column in columns])
            near -= np.exp(columns[0][used]).sum() - 1.0
            logs += count * np.log(near)
            if self.heavy:
                ratios += count * _log1p(far[0] / near)
        return logs, ratios


def _log_sum(exponents):
    largest = float(exponents.max())
    return largest + math.log(float(np.exp(exponents - largest).sum()))


def _log1p(z):
    """Returns log(1 + z) of complex z with the digits of a small z."""
    small = np.abs(z) < 1e-4
    return np.where(small, z - z**2 / 2.0 + z**3 / 3.0, np.log1p(z))


def _expm1(x):
    return np.expm1(np.minimum(x, 700.0))


def _transform(centres, offsets, losses, weights):
    """Returns Σ_k B_k e^(i t l_k) at t = centre + offset, for each vector B of weights."""
    inner = np.exp(1j * np.multiply.outer(losses, offsets))
    results = [np.empty((len(centres), len(offsets)), dtype=np.complex128) for _ in weights]
    rows = max(1, int(1e6 / max(len(losses), 1)))
    for start in range(0, len(centres), rows):
        outer = np.exp(1j * np.multiply.outer(centres[start : start + rows], losses))
        for result, weight in zip(results, weights, strict=True):
            result[start : start + rows] = (outer * weight) @ inner
    return results


def saddle(composition, epsilon, *, cut=None, heavy=False):
    """Returns the line c > 1 on which the integrand at t = 0 is least."""
    lines = {}

    def value(u):
        if u not in lines:
            try:
                lines[u] = Line(composition, 1.0 + math.exp(u), cut, heavy=heavy)
            except UndecidedError:  # so far to the right that its exponents cannot be resolved
                return math.inf
        return lines[u].log_integrand(epsilon)

    grid = [float(u) for u in np.arange(-16.0, 16.1, 1.0)]
    best = 0
    for index, u in enumerate(grid):  # log-convex: stop once it grows
        if value(u) < value(grid[best]):
            best = index
            if not heavy and lines[u].chernoff(epsilon) < NOTHING:
                return lines[u]
        elif index > best + 1:
            break
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - golden * (high - low), low + golden * (high - low)
    for _ in range(6):
        if value(left) < value(right):
            high, right = right, left
            left = high - golden * (high - low)
        else:
            low, left = left, right
            right = low + golden * (high - low)
    return lines[min(lines, key=value)]


def integrate(line, epsilon):
    """Returns the integral along the line over the integrand's size at t = 0, and an estimate of the error."""
    c = line.c
    scale = 1.0 / math.sqrt(line.variance + c**-2 + (c - 1.0) ** -2)
    if line.log_ratio > 600.0:
        raise UndecidedError("the light losses are a vanishing part")
    size = math.expm1(line.log_ratio) if line.heavy else 1.0

    def integrand(centres, offsets):
        t = centres[:, None] + offsets
        logs, ratios = line.logs(centres, offsets)
        value = np.exp(logs - 1j * t * epsilon)
        if line.heavy:
            value = value * np.expm1(ratios) / size
        return (value * (c * (c - 1.0) / ((c + 1j * t) * (c - 1.0 + 1j * t)))).real

    tolerance = TOLERANCE + 2e-15 * line.counts
    total = error = 0.0
    low, high = 0.0, 2.0 * scale
    panels = 1
    while True:
        panels = max(1, panels // 2)
        value, _ = _composite(integrand, low, high, panels)
        while True:
            panels *= 2
            finer, largest = _composite(integrand, low, high, panels)
            difference, value = abs(finer - value), finer
            if difference <= tolerance * max(abs(total + value), 1e-4 * scale):
                break
            if panels > 4096:
                raise UndecidedError("the integrand oscillates too fast")
        total, error = total + value, error + difference
        # |z|^-2 falls even where M does not, so what is left is at most about high times the integrand.
        if largest * high <= 3e-6 * abs(total) and abs(value) <= 3e-6 * abs(total):
            return total, error + largest * high
        low, high = high, 2.0 * high


def _composite(function, low, high, panels):
    half = (high - low) / (2.0 * panels)
    values = function(low + half * (2.0 * np.arange(panels) + 1.0), half * NODES)
    return float((values @ WEIGHTS).sum() * half), float(np.abs(values).max())


def _interval(line, epsilon):
    """Returns (low, high) around the integral, from two lines that must agree."""
    answers = []
    for c in (line.c, 1.0 + 0.8 * (line.c - 1.0)):
        each = Line(line.composition, c, line.cut, heavy=line.heavy)
        total, error = integrate(each, epsilon)
        scale = math.exp(min(each.log_integrand(epsilon), 700.0)) / math.pi
        answers.append((total * scale, error * scale))
    (first, first_error), (second, second_error) = answers
    error = first_error + second_error + abs(first - second) + 1e-9 * abs(first)
    value = (first + second) / 2.0
    return max(0.0, value - error), max(0.0, value + error)


def one_direction(composition, epsilon):
    """Returns (low, high) around δ(ε) of P against Q as they stand."""
    line = saddle(composition, epsilon)
    if (bound := line.chernoff(epsilon)) < NOTHING:
        return 0.0, bound
    if _plain(line, epsilon):
        return _interval(line, epsilon)
    for ratio in CUTS:
        cut = Cut(ratio * epsilon)
        heavy = saddle(composition, epsilon, cut=cut, heavy=True)
        light = saddle(composition, epsilon, cut=cut)
        low, high = 0.0, light.chernoff(epsilon)
        if high <= 1e-10 * math.exp(min(heavy.log_integrand(epsilon), 700.0)):
            break
        if _plain(light, epsilon):
            low, high = _interval(light, epsilon)
            break
    else:
        raise UndecidedError("no cut separates light from heavy losses")
    more_low, more_high = _interval(heavy, epsilon)
    return low + more_low, min(1.0, high + more_high)


def _plain(line, epsilon):
    """Returns whether M falls soon enough along the line, and without much cancellation, to need no cut."""
    if not line.composition.steps or epsilon <= 0.0:
        return True
    t = max(120.0 * math.pi / epsilon, 12.0 / math.sqrt(line.variance + 1e-300))
    try:
        logs, _ = line.logs(np.array([t, 1.5 * t, 2.2 * t]), np.zeros(1))
        if not (logs.real < -16.0).all():
            return False
        scale = 1.0 / math.sqrt(line.variance + line.c**-2 + (line.c - 1.0) ** -2)
        return integrate(line, epsilon)[0] > 0.03 * scale
    except UndecidedError:
        return False
