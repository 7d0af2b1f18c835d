"""One direction or both of a composition on a grid of losses, and what is read off it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from privet.accounting.blocks import TooWideError, block_lattice, block_size, refinement
from privet.accounting.composition import (
    WRAPPED,
    Composition,
    Spectrum,
    Tail,
    Window,
    good_size,
    spectrum_of,
    tail_of,
    window_for,
)
from privet.accounting.goal import Goal, Place, added, finest
from privet.accounting.lattice import Lattice, lattice_above, lattice_below, rare_lattice, usual_lattice
from privet.accounting.moments import Law
from privet.accounting.profile import Answer, Frame, Profile
from privet.accounting.terms import Term

__all__ = ["Grid", "Piece", "Prepared"]

_ROOM_FOR_SPECTRA = 64 * 2**20  # bytes a grid


class Piece(NamedTuple):
    """What is composed as one: a step of a term, a block of steps, or the rare factor of a step."""

    term: Term
    size: int
    rare: bool = False


@dataclass(frozen=True)
class Prepared:
    """One direction of one piece on a grid whose circle is not known yet."""

    lattice: Lattice | None  # None where there are too many to keep them all
    tail: Tail


@dataclass(frozen=True)
class _Direction:
    """One direction of one piece on its circle."""

    tail: Tail
    spectrum: Spectrum | None
    log_kept: float
    offset: float


class _UsualLosses:
    """δ of the steps without a rare loss, by Chernoff's bound on their cumulants: it is a small part of the whole.

    Canonne, Kamath and Steinke, arXiv 2004.00010: (1 - e^(ε - L))+ is at most e^(s(L - ε)) (s/(s+1))^s / (s+1).
    """

    def __init__(self, parts: list[tuple[Tail, int]]) -> None:
        self._parts = parts
        self._moments: dict[float, float] = {}

    def __call__(self, epsilon: float) -> float:
        if epsilon <= 0.0:
            return 1.0
        if math.isinf(epsilon):
            return 0.0
        least = 0.0
        # Powers of √2, so that the moments serve every ε.
        centre = round(2.0 * math.log2(1.0 / epsilon))
        for exponent in range(centre - 6, centre + 30):
            s = 2.0 ** (exponent / 2.0)
            if s not in self._moments:
                self._moments[s] = math.fsum(count * tail.log_moment(s) for tail, count in self._parts)
            least = min(least, self._moments[s] - s * epsilon - math.log1p(s) - s * math.log1p(1.0 / s))
        return math.exp(least)


class Grid:
    """A spacing, a tilt for each direction, the spectra of pieces on them, and the composition last asked for.

    It outlives a question: one step more costs one addition of spectra and one transform back.
    """

    def __init__(self, goal: Goal, *, spacing: float, truncation: float, widest: float) -> None:
        self.goal, self.spacing, self.truncation, self.widest = goal, spacing, truncation, widest
        self.limited = False  # whether the spacing is the finest that is allowed, not the one that was wanted
        self._block_sizes: dict[Term, int] = {}
        self._sizes: list[int] = []
        self._directions: dict[Piece, tuple[_Direction, ...]] = {}
        self._counts: dict[Piece, int] = {}
        self._composed: list[Composition] = []
        self._changes = 0
        self._room = _ROOM_FOR_SPECTRA
        self._frames: list[Frame | None] = [None] * len(goal.places)
        self._profiles: list[Profile] | None = None

    @property
    def sides(self) -> range:
        """The directions: one where both are the same."""
        return range(len(self.goal.places))

    # -- pieces -------------------------------------------------------------------------------------------------------

    def pieces(self, counts: Mapping[Term, int]) -> dict[Piece, int]:
        """Returns the counts in blocks and single steps. A term keeps the size of its blocks as long as the grid."""
        found: dict[Piece, int] = {}
        for term, count in counts.items():
            most = finest(self.goal, self.spacing, self.widest)
            size = self._block_sizes.setdefault(term, min(block_size(count), 4 ** int(math.log2(max(most, 1.0)))))
            blocks, single = divmod(count, size)
            if blocks:
                found[Piece(term, size)] = blocks
            if single:
                found[Piece(term, 1)] = single
            if self.goal.splits:
                found[Piece(term, 1, rare=True)] = count
        return found

    def prepare(self, piece: Piece) -> tuple[Prepared, ...]:
        """Returns a piece's distributions, tilted, in each direction."""
        prepared = []
        for side, place in enumerate(self.goal.places):
            lattice = self._lattice(piece, place, forward=side == 0)
            if piece.size > 1:
                # Without a tilt the rounding of a block would lie in its tail, where the rare losses are sought.
                tilt = place.usual_tilt if math.isfinite(place.split) else place.tilt
                lattice = block_lattice(lattice, self.spacing, tilt, piece.size, self.goal.log_delta)
            prepared.append(Prepared(lattice, tail_of(lattice, self.spacing, place.tilt)))
        return tuple(prepared)

    def _lattice(self, piece: Piece, place: Place, *, forward: bool) -> Lattice:
        """Returns the lattice of one step of a piece in one direction, on the grid that its blocks need."""
        term, step, tail = piece.term, self.spacing / refinement(piece.size), self.truncation
        if self.goal.below:
            return lattice_below(term, step, tail, forward=forward)
        if math.isinf(place.split):
            nothing = Lattice(0, np.array([1.0, 0.0]), 0.0)
            return nothing if piece.rare else lattice_above(term, step, tail, forward=forward, tilt=place.tilt)
        # The split lies between the same two cells of every grid that this one refines.
        split = max(round(place.split / self.spacing), 1) * self.spacing
        return (rare_lattice if piece.rare else usual_lattice)(term, step, tail, split, forward=forward)

    def start(self, counts: Mapping[Piece, int], prepared: dict[Piece, tuple[Prepared, ...]]) -> None:
        """Chooses the circles, and composes the counts on them."""
        for side in self.sides:
            size = self.window(side, ((prepared[piece][side].tail, count) for piece, count in counts.items())).size
            self._sizes.append(good_size(int(1.1 * size) + 64))
        self._composed = [Composition(size=size) for size in self._sizes]
        for piece, both in prepared.items():
            self.place(piece, both, counts[piece])

    def window(self, side: int, tails: Iterator[tuple[Tail, int]]) -> Window:
        """Returns the window that a composition needs; without a tilt it is to miss less than δ itself."""
        place = self.goal.places[side]
        wrapped = WRAPPED if math.isinf(place.split) else 12.0 - self.goal.log_delta
        return window_for(list(tails), self.spacing, wrapped)

    def place(self, piece: Piece, prepared: tuple[Prepared, ...] | None = None, count: int = 0) -> None:
        """Takes a piece's distributions onto the circles, if they are not there yet, and composes `count` of them."""
        if piece in self._directions:
            return
        if prepared is None or prepared[0].lattice is None:
            prepared = self.prepare(piece)
        kept = self._room > 0
        found, spectra = [], []
        for side, each in enumerate(prepared):
            assert each.lattice is not None
            spectrum = self._spectrum(side, each)
            spectra.append(spectrum)
            self._room -= spectrum.angle.size * 24
            log_kept = math.log1p(-each.lattice.infinity) if each.lattice.infinity < 1.0 else -math.inf
            found.append(_Direction(each.tail, spectrum if kept else None, log_kept, each.lattice.offset))
        self._directions[piece] = tuple(found)
        if count:
            for composed, spectrum in zip(self._composed, spectra, strict=True):
                composed.add(spectrum, count)
            self._counts[piece] = count

    def _spectrum(self, side: int, prepared: Prepared) -> Spectrum:
        assert prepared.lattice is not None
        place = self.goal.places[side]
        return spectrum_of(prepared.lattice, prepared.tail, self.spacing, place.tilt, self._sizes[side])

    def _spectra(self, piece: Piece) -> list[Spectrum]:
        """Returns the spectra of each direction, made again where there was no room to keep them."""
        found = [direction.spectrum for direction in self._directions[piece]]
        kept = [spectrum for spectrum in found if spectrum is not None]
        if len(kept) == len(found):
            return kept
        return [self._spectrum(side, each) for side, each in enumerate(self.prepare(piece))]

    def missing(self, counts: Mapping[Term, int]) -> int:
        """Returns how many of the terms are not on the grid yet."""
        return sum(term not in self._block_sizes for term in counts)

    def holds(self, counts: Mapping[Term, int]) -> bool:
        """Returns whether these very counts are composed."""
        return self._profiles is not None and self.pieces(counts) == self._counts

    def _compose(self, counts: dict[Piece, int]) -> None:
        changed = {piece: count - self._counts.get(piece, 0) for piece, count in counts.items()}
        changed |= {piece: -count for piece, count in self._counts.items() if piece not in counts}
        self._changes += sum(1 for change in changed.values() if change)
        if self._changes > max(256, sum(counts.values())):
            # Sums that were added to more often than there are pieces are formed afresh: rounding is stated by piece.
            self._composed = [Composition(size=size) for size in self._sizes]
            self._counts, self._changes, changed = {}, 0, dict(counts)
            self._directions = {piece: kept for piece, kept in self._directions.items() if piece in counts}
        # What can fail comes first. Sums that an exception leaves half changed are formed anew by the next question.
        changed = {piece: change for piece, change in changed.items() if change}
        for piece in changed:
            self.place(piece)
        self._profiles, done = None, False
        try:
            for piece, change in changed.items():
                for spectrum, composed in zip(self._spectra(piece), self._composed, strict=True):
                    composed.add(spectrum, change)
            self._counts, done = counts, True
        finally:
            if not done:
                self._composed = [Composition(size=size) for size in self._sizes]
                self._counts, self._changes = {}, 0

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, counts: Mapping[Term, int]) -> list[Profile] | None:
        """Returns the profile of each direction for these counts, or None if they do not fit on this grid."""
        pieces = self.pieces(counts)
        if self._profiles is not None and pieces == self._counts:
            return self._profiles
        if sum(counts.values()) == 1:
            return self._alone(next(iter(counts)))
        try:
            self._compose(pieces)
        except TooWideError:
            return None
        found = []
        for side in self.sides:
            profile = self._read_side(side, [(piece, self._directions[piece][side], n) for piece, n in pieces.items()])
            if profile is None:
                return None
            found.append(profile)
        self._profiles = found
        return found

    def _alone(self, term: Term) -> list[Profile]:
        """Returns the profiles of one step, which needs no transform and no tilt: its lattice is its mass."""
        found = []
        for place, each in zip(self.goal.places, self.prepare(Piece(term, 1)), strict=True):
            assert each.lattice is not None
            window = Window(each.lattice.first, len(each.lattice.mass), math.inf)
            frame = Frame(window, step=self.spacing, tilt=0.0, reference=max(place.epsilon, 0.0))
            infinity, offset = each.lattice.infinity, each.lattice.offset
            profile = Profile(
                frame, each.lattice.mass, 0.0, log_scale=0.0, infinity=infinity, offset=offset, below=self.goal.below
            )
            found.append(profile)
        return found

    def _read_side(self, side: int, parts: list[tuple[Piece, _Direction, int]]) -> Profile | None:
        composed, place = self._composed[side], self.goal.places[side]
        needed = self.window(side, ((part.tail, count) for _, part, count in parts))
        if needed.size > composed.size:
            return None
        low, frame = needed.low + composed.shift, self._frames[side]
        if frame is None or not frame.window.low <= low <= frame.window.low + composed.size - needed.size:
            window = Window(low - (composed.size - needed.size) // 4, composed.size, needed.wrapped)
            frame = Frame(window, step=self.spacing, tilt=place.tilt, reference=max(place.epsilon, 0.0))
            self._frames[side] = frame
        mass, rounding = composed.masses(frame.window)
        usual = _UsualLosses([(part.tail, count) for piece, part, count in parts if not piece.rare])
        steps = sum(piece.size * count for piece, _, count in parts)
        slack = 2e-15 * steps * (-1.0 if self.goal.below else 1.0)  # Φ and the sums of lattices are rounded
        return Profile(
            frame,
            mass,
            rounding,
            log_scale=math.fsum(count * part.tail.log_scale for _, part, count in parts) + slack,
            infinity=-math.expm1(math.fsum(count * part.log_kept for _, part, count in parts)),
            offset=math.fsum(count * part.offset for _, part, count in parts),
            below=self.goal.below,
            rest=usual if math.isfinite(place.split) and not self.goal.below else None,
        )

    def answers(self, counts: Mapping[Term, int], delta: float) -> list[Answer] | None:
        """Returns ε at δ in each direction, or None if the counts do not fit on this grid."""
        profiles = self.read(counts)
        return None if profiles is None else [profile.answer(delta) for profile in profiles]

    def added(self, law: Law, place: Place) -> float:
        """Returns about how much the spacing adds to ε: half the slope times the variance that it adds."""
        return float(added(law, place, self.goal, np.array([self.spacing]), self.widest)[0])
