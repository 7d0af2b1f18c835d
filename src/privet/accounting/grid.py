"""A grid of losses chosen for one place on the curve, and what is composed on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from privet.accounting.composition import (
    Composition,
    Frame,
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

__all__ = ["Goal", "Grid", "Readings", "grid_for"]

_LARGEST_LATTICE = 2**20
_LARGEST_CIRCLE = 2**21
_MOST_LATTICES_KEPT = 256
_ROOM_FOR_SPECTRA = 64 * 2**20  # bytes a grid


@dataclass(frozen=True)
class Goal:
    """Where on the curve the answer is sought, by Rényi's bound: it sets tilt, grid and truncation.

    `aim` is the ε to be accurate at, which may be well below Rényi's.
    """

    epsilon: float
    log_delta: float
    order: float
    aim: float

    @property
    def tilt(self) -> float:
        """The tilt λ = α - 1: Rényi's best order is the saddle point."""
        return self.order - 1.0


@dataclass(frozen=True)
class _Prepared:
    """One direction of one term on a grid whose circle is not known yet."""

    lattice: Lattice | None  # None where there are too many terms to keep them all
    tail: Tail
    infinity: float
    added: float
    raised: float


@dataclass(frozen=True)
class _Direction:
    """One direction of one term; `added` is the variance that the grid gives a step, without the tilt."""

    tail: Tail
    spectrum: Spectrum | None
    log_kept: float
    added: float
    raised: float


@dataclass(frozen=True)
class Readings:
    """The profile of one direction, and what its lower bound needs: the grid's variance and the mass moved up."""

    profile: Profile
    added: float
    raised: float


def _prepared(term: Term, step: float, truncation: float, tilt: float) -> tuple[_Prepared, ...]:
    """Returns both directions, or one where they are the same."""
    found = (lattice for lattice in lattices(term, step, truncation) if lattice is not None)
    return tuple(
        _Prepared(
            lattice=lattice,
            tail=tail_of(lattice, step, tilt),
            infinity=lattice.infinity,
            added=float(lattice.variance.sum()),
            raised=lattice.raised,
        )
        for lattice in found
    )


class Grid:
    """A step, a tilt, and the spectra of terms on them, with the composition of the counts last asked for.

    It outlives a question: one step more costs one addition of spectra and one transform back.
    """

    def __init__(self, goal: Goal, *, step: float, size: int, truncation: float) -> None:
        self.goal, self.step, self.size, self.truncation = goal, step, size, truncation
        self._directions: dict[Term, tuple[_Direction, ...]] = {}
        self._counts: dict[Term, int] = {}
        self._composed = (Composition(size=size), Composition(size=size))
        self._changes = 0
        self._room = _ROOM_FOR_SPECTRA
        self._frames: list[Frame | None] = [None, None]
        self._readings: list[Readings] | None = None

    def place(self, term: Term, prepared: tuple[_Prepared, ...] | None = None, count: int = 0) -> None:
        """Takes a term's distributions onto the circle, if they are not there yet, and composes `count` of them."""
        if term in self._directions:
            return
        if prepared is None or prepared[0].lattice is None:
            prepared = _prepared(term, self.step, self.truncation, self.goal.tilt)
        spectra = [self._spectrum(each) for each in prepared]
        kept = self._room > 0
        self._room -= sum(spectrum.angle.size for spectrum in spectra) * 16
        self._directions[term] = tuple(
            _Direction(
                tail=each.tail,
                spectrum=spectrum if kept else None,
                log_kept=math.log1p(-each.infinity),
                added=each.added,
                raised=each.raised,
            )
            for each, spectrum in zip(prepared, spectra, strict=True)
        )
        if count:
            self._composed[0].add(spectra[0], count)
            self._composed[1].add(spectra[-1], count)
            self._counts[term] = count

    def _spectrum(self, prepared: _Prepared) -> Spectrum:
        assert prepared.lattice is not None
        return spectrum_of(prepared.lattice, prepared.tail, self.step, self.goal.tilt, self.size)

    def _spectra(self, term: Term) -> tuple[Spectrum, Spectrum]:
        """Returns the spectra of both directions, made again where there was no room to keep them."""
        found = [direction.spectrum for direction in self._directions[term]]
        if found[0] is None or found[-1] is None:
            again = _prepared(term, self.step, self.truncation, self.goal.tilt)
            return self._spectrum(again[0]), self._spectrum(again[-1])
        return found[0], found[-1]

    def missing(self, counts: Mapping[Term, int]) -> int:
        """Returns how many of the terms are not on the grid yet."""
        return sum(term not in self._directions for term in counts)

    def _compose(self, counts: Mapping[Term, int]) -> None:
        changed = {term: count - self._counts.get(term, 0) for term, count in counts.items()}
        changed |= {term: -count for term, count in self._counts.items() if term not in counts}
        self._changes += sum(1 for change in changed.values() if change)
        if self._changes > max(256, sum(counts.values())):
            # Sums that were added to more often than there are steps are formed afresh: the stated rounding is by step.
            self._composed = (Composition(size=self.size), Composition(size=self.size))
            self._changes, changed = 0, dict(counts)
            self._directions = {term: kept for term, kept in self._directions.items() if term in counts}
        for term, change in changed.items():
            if change:
                self.place(term)
                for spectrum, composed in zip(self._spectra(term), self._composed, strict=True):
                    composed.add(spectrum, change)
        self._counts, self._readings = dict(counts), None

    def _both(self, term: Term) -> tuple[_Direction, _Direction]:
        found = self._directions[term]
        return found[0], found[-1]

    def read(self, counts: Mapping[Term, int]) -> list[Readings] | None:
        """Returns the profile of each direction for these counts, or None if they do not fit on this grid."""
        if self._readings is not None and counts == self._counts:
            return self._readings
        self._compose(counts)
        one_sided = all(len(self._directions[term]) == 1 for term in counts)
        found = []
        for side in range(1 if one_sided else 2):
            reading = self._read_side(side, [(self._both(term)[side], count) for term, count in counts.items()])
            if reading is None:
                return None
            found.append(reading)
        self._readings = found
        return found

    def _read_side(self, side: int, parts: list[tuple[_Direction, int]]) -> Readings | None:
        composed = self._composed[side]
        needed = _window(parts, self.step)
        if needed.size > self.size:
            return None
        low, frame = needed.low + composed.shift, self._frames[side]
        if frame is None or not frame.window.low <= low <= frame.window.low + self.size - needed.size:
            window = Window(low - (self.size - needed.size) // 4, self.size, needed.log_above)
            frame = Frame(window, step=self.step, tilt=self.goal.tilt, reference=self.goal.aim)
            self._frames[side] = frame
        mass, rounding = composed.masses(frame.window)
        profile = Profile(
            frame,
            mass,
            rounding,
            log_scale=sum(count * part.tail.log_scale for part, count in parts) + 4e-16 * composed.steps,
            infinity=-math.expm1(sum(count * part.log_kept for part, count in parts)),
        )
        added = sum(count * part.added for part, count in parts)
        return Readings(profile, added, sum(count * part.raised for part, count in parts))

    def error(self, counts: Mapping[Term, int]) -> float:
        """Returns about how much the grid adds to ε: half the tilt times the variance that it adds."""
        added = [sum(count * self._both(term)[side].tail.added for term, count in counts.items()) for side in (0, 1)]
        return self.goal.tilt / 2.0 * max(added)


def _window(parts: list[tuple[_Direction, int]], step: float) -> Window:
    return window_for([(part.tail, count) for part, count in parts], step)


def grid_for(counts: Mapping[Term, int], goal: Goal, *, tolerance: float) -> Grid:
    """Returns a grid on which the counts compose with an error of about `tolerance` times ε, or the finest allowed."""
    steps = sum(counts.values())
    truncation = max(math.exp(max(goal.log_delta, -660.0)) * 2e-5 / steps, 1e-290)
    spans = [_span(term, truncation) for term in counts]
    finest = max(spans) / _LARGEST_LATTICE
    allowed = tolerance * max(goal.aim, 2e-3)
    step = max(finest, min(math.sqrt(12.0 * allowed / (goal.tilt * steps)), max(spans) / 64.0))
    # A few terms tell how fine the grid has to be for all.
    every = -(-len(counts) // 6)
    probes = dict(list(counts.items())[::every])
    share = steps / sum(probes.values())
    prepared: dict[Term, tuple[_Prepared, ...]] = {}
    last = math.inf
    for _ in range(8):
        prepared = {term: _prepared(term, step, truncation, goal.tilt) for term in probes}
        sides = _sides(prepared, counts)
        error = share * goal.tilt / 2.0 * max(sum(count * tail.added for tail, count in side) for side in sides)
        size = math.sqrt(share) * max(window_for(side, step).size for side in sides)
        if size > _LARGEST_CIRCLE:
            step *= 1.1 * size / _LARGEST_CIRCLE
            finest = step
        elif error <= 1.5 * allowed or step <= finest or error > 0.8 * last:
            break  # fine enough, or refining does not help: what is left is rounding
        else:
            step, last = max(finest, step * min(0.7, max(0.1, (allowed / error) ** 0.6))), error
    for term in counts:
        if term not in prepared:
            both = _prepared(term, step, truncation, goal.tilt)
            crowded = len(prepared) >= _MOST_LATTICES_KEPT
            prepared[term] = tuple(replace(each, lattice=None) for each in both) if crowded else both
    size = max(window_for(side, step).size for side in _sides(prepared, counts))
    grid = Grid(goal, step=step, size=good_size(int(1.1 * size) + 64), truncation=truncation)
    for term, both in prepared.items():
        grid.place(term, both, counts[term])
    return grid


def _sides(
    prepared: Mapping[Term, tuple[_Prepared, ...]], counts: Mapping[Term, int]
) -> tuple[list[tuple[Tail, int]], list[tuple[Tail, int]]]:
    """Returns what the two directions compose."""
    return (
        [(both[0].tail, counts[term]) for term, both in prepared.items()],
        [(both[-1].tail, counts[term]) for term, both in prepared.items()],
    )


def _span(term: Term, truncation: float) -> float:
    spans = []
    for _, part in term.parts:
        pair = mixtures(part)
        ends = pair.loss(np.array(pair.reach(truncation)))
        spans.append(float(ends[1] - ends[0]))
    return max(*spans, 1e-6)
