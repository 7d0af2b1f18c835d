"""A grid of losses chosen for one place on the curve, and what is composed on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from privet.accounting.composition import (
    Composition,
    Profile,
    Spectrum,
    Tail,
    Window,
    good_size,
    spectrum_of,
    tail_of,
    window_for,
)
from privet.accounting.lattice import Lattice, lattices
from privet.accounting.pairs import mixtures
from privet.accounting.terms import Term

__all__ = ["Goal", "Grid", "grid_for"]

_LARGEST_LATTICE = 2**21
_LARGEST_CIRCLE = 2**22
_MOST_TERMS_KEPT = 512


@dataclass(frozen=True)
class Goal:
    """Where on the curve the answer is sought, by Rényi's bound: it sets tilt, grid and truncation."""

    epsilon: float
    log_delta: float
    order: float

    @property
    def tilt(self) -> float:
        """The tilt λ = α - 1: Rényi's best order is the saddle point."""
        return self.order - 1.0


@dataclass(frozen=True)
class _Direction:
    """One direction of one term on the grid; `added` is the variance that the grid gives a step, untilted."""

    tail: Tail
    spectrum: Spectrum
    log_kept: float
    added: float
    raised: float


@dataclass(frozen=True)
class Readings:
    """The profile of one direction, and what its lower bound needs: the grid's variance and the mass moved up."""

    profile: Profile
    added: float
    raised: float


class Grid:
    """A step, a tilt, and the spectra of terms on them, with the composition of the counts last asked for.

    It outlives a question: one step more costs one addition of spectra and one transform back.
    """

    def __init__(self, goal: Goal, *, step: float, size: int, truncation: float) -> None:
        self.goal, self.step, self.size, self.truncation = goal, step, size, truncation
        self._directions: dict[Term, tuple[_Direction, _Direction | None]] = {}
        self._counts: dict[Term, int] = {}
        self._composed = self._fresh()
        self._changes = 0

    def _fresh(self) -> tuple[Composition, Composition]:
        first, second = (Composition(step=self.step, tilt=self.goal.tilt, size=self.size) for _ in range(2))
        return first, second

    def place(self, term: Term, found: tuple[Lattice, Lattice | None] | None = None) -> None:
        """Takes a term's distributions onto the grid, computing them where they are not given."""
        if term in self._directions:
            return
        lattice, other = lattices(term, self.step, self.truncation) if found is None else found
        self._directions[term] = self._direction(lattice), None if other is None else self._direction(other)

    def missing(self, counts: Mapping[Term, int]) -> int:
        """Returns how many of the terms are not on the grid yet."""
        return sum(term not in self._directions for term in counts)

    def _direction(self, lattice: Lattice) -> _Direction:
        tail = tail_of(lattice, self.step, self.goal.tilt)
        spectrum = spectrum_of(lattice, tail, self.step, self.goal.tilt, self.size)
        return _Direction(tail, spectrum, math.log1p(-lattice.infinity), float(lattice.variance.sum()), lattice.raised)

    def _compose(self, counts: Mapping[Term, int]) -> None:
        changed = {term: count - self._counts.get(term, 0) for term, count in counts.items()}
        changed |= {term: -count for term, count in self._counts.items() if term not in counts}
        self._changes += sum(1 for change in changed.values() if change)
        if self._changes > 256:
            # Sums that were added to many times are formed afresh, so that rounding cannot pile up.
            self._composed, self._changes, changed = self._fresh(), 0, dict(counts)
            if len(self._directions) > _MOST_TERMS_KEPT:
                self._directions = {term: kept for term, kept in self._directions.items() if term in counts}
        for term, change in changed.items():
            if change:
                self.place(term)
                for direction, composed in zip(self._both(term), self._composed, strict=True):
                    composed.add(direction.spectrum, change)
        self._counts = dict(counts)

    def _both(self, term: Term) -> tuple[_Direction, _Direction]:
        first, second = self._directions[term]
        return first, first if second is None else second

    def read(self, counts: Mapping[Term, int], reference: float) -> list[Readings] | None:
        """Returns the profile of each direction for these counts, or None if they do not fit on this grid."""
        self._compose(counts)
        one_sided = all(self._directions[term][1] is None for term in counts)
        found = []
        for side, composed in enumerate(self._composed[: 1 if one_sided else 2]):
            parts = [(self._both(term)[side], count) for term, count in counts.items()]
            window = _window(parts, self.step)
            if window.size > self.size:
                return None
            steps = sum(count for _, count in parts)
            profile = composed.profile(
                Window(window.low - (self.size - window.size) // 2, self.size, window.log_above),
                log_scale=sum(count * part.tail.log_scale for part, count in parts) + 4e-16 * steps,
                infinity=-math.expm1(sum(count * part.log_kept for part, count in parts)),
                reference=reference,
            )
            added = sum(count * part.added for part, count in parts)
            found.append(Readings(profile, added, sum(count * part.raised for part, count in parts)))
        return found

    def error(self, counts: Mapping[Term, int]) -> float:
        """Returns about how much the grid adds to ε: half the tilt times the variance that it adds."""
        added = [sum(count * self._both(term)[side].tail.added for term, count in counts.items()) for side in (0, 1)]
        return self.goal.tilt / 2.0 * max(added)


def _window(parts: list[tuple[_Direction, int]], step: float) -> Window:
    tails = [(part.tail, count) for part, count in parts]
    return window_for(tails, [part.spectrum.centre for part, _ in parts], step)


def grid_for(counts: Mapping[Term, int], goal: Goal, *, tolerance: float) -> Grid:
    """Returns a grid on which the counts compose with an error of about `tolerance` times ε, or the finest allowed."""
    steps = sum(counts.values())
    truncation = max(math.exp(max(goal.log_delta, -660.0)) * 2e-5 / steps, 1e-290)
    spans = [_span(term, truncation) for term in counts]
    finest = max(spans) / _LARGEST_LATTICE
    allowed = tolerance * max(goal.epsilon, 1e-9)
    step = max(finest, min(math.sqrt(12.0 * allowed / (goal.tilt * steps)), max(spans) / 64.0))
    for _ in range(8):
        found = {term: lattices(term, step, truncation) for term in counts}
        tails = {
            term: [tail_of(each, step, goal.tilt) for each in both if each is not None] for term, both in found.items()
        }
        sides = [[(both[min(side, len(both) - 1)], counts[term]) for term, both in tails.items()] for side in (0, 1)]
        error = goal.tilt / 2.0 * max(sum(count * tail.added for tail, count in side) for side in sides)
        size = max(window_for(side, [round(tail.mean / step) for tail, _ in side], step).size for side in sides)
        if size > _LARGEST_CIRCLE:
            step *= 1.1 * size / _LARGEST_CIRCLE
            finest = step
        elif error <= 1.5 * allowed or step <= finest:
            break
        else:
            step = max(finest, step * min(0.8, max(0.1, (allowed / error) ** 0.6)))
    grid = Grid(goal, step=step, size=good_size(int(1.05 * size) + 64), truncation=truncation)
    for term, both in found.items():
        grid.place(term, both)
    return grid


def _span(term: Term, truncation: float) -> float:
    spans = []
    for _, part in term.parts:
        pair = mixtures(part)
        ends = pair.loss(np.array(pair.reach(truncation)))
        spans.append(float(ends[1] - ends[0]))
    return max(spans)
