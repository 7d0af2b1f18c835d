"""The choice of a grid: how fine its losses have to lie for a question, and how large its circles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from privet.accounting.allocation import loss_law
from privet.accounting.blocks import TooWideError
from privet.accounting.goal import CUTS, MOST_CELLS, Goal, Place, added
from privet.accounting.grid import Grid, Piece, Prepared
from privet.accounting.moments import Law
from privet.accounting.pairs import mixtures
from privet.accounting.terms import Pair, Term

__all__ = ["grid_for"]

_USUAL_CIRCLE = 2**17  # above it a question costs more than some tens of milliseconds
_LARGEST_CIRCLE = 2**19
_MOST_LATTICES_KEPT = 256


def grid_for(counts: Mapping[Term, int], both: tuple[Law, ...], goal: Goal) -> Grid:
    """Returns a grid on which the counts compose with about the goal's error, or the finest allowed.

    Args:
        counts: The terms and how often each is composed.
        both: The law of each direction, or a sketch of it; it tells what a spacing adds.
        goal: What is asked.
    """
    try:
        return _grid_for(counts, both, goal)
    except TooWideError:
        return _grid_for(counts, both, replace(goal, one_stage=True))


def _grid_for(counts: Mapping[Term, int], both: tuple[Law, ...], goal: Goal) -> Grid:
    steps = sum(counts.values())
    truncation = max(math.exp(max(goal.log_delta, -660.0)) * goal.cut / steps, 1e-290)
    widest = _widest(counts, truncation)
    wanted = min(_spacing(law, place, goal, widest) for law, place in zip(both, goal.places, strict=True))
    wanted = max(wanted, 1e-300)
    limit = _LARGEST_CIRCLE if goal.cut == CUTS[-1] else _USUAL_CIRCLE
    spacing = max(wanted, widest / MOST_CELLS)
    grid, prepared = _fitted(counts, goal, spacing=spacing, truncation=truncation, widest=widest, limit=limit)
    grid.limited = grid.spacing > wanted
    if steps == 1:
        return grid
    pieces = grid.pieces(counts)
    for piece in pieces:
        if piece not in prepared:
            found = grid.prepare(piece)
            crowded = len(prepared) >= _MOST_LATTICES_KEPT
            prepared[piece] = tuple(replace(each, lattice=None) for each in found) if crowded else found
    grid.start(pieces, prepared)
    return grid


def _fitted(
    counts: Mapping[Term, int], goal: Goal, *, spacing: float, truncation: float, widest: float, limit: int
) -> tuple[Grid, dict[Piece, tuple[Prepared, ...]]]:
    """Returns a grid of at least this spacing whose circles have at most `limit` losses, with a few pieces prepared."""
    for _ in range(8):
        grid = Grid(goal, spacing=spacing, truncation=truncation, widest=widest)
        pieces = grid.pieces(counts)
        # A few pieces tell how large the circle has to be for all.
        probes = dict(list(pieces.items())[:: -(-len(pieces) // 6)])
        prepared = {piece: grid.prepare(piece) for piece in probes}
        share = sum(counts.values()) / sum(piece.size * count for piece, count in probes.items())
        size = max(
            math.sqrt(share)
            * grid.window(side, ((prepared[piece][side].tail, count) for piece, count in probes.items())).size
            for side in grid.sides
        )
        if size <= limit:
            break
        spacing *= 1.1 * size / limit
    return grid, prepared


def _spacing(law: Law, place: Place, goal: Goal, widest: float) -> float:
    """Returns the coarsest spacing that adds no more than the goal allows to ε."""
    allowed = goal.allowed(place)
    coarsest = widest / 64.0 * (law.finest if goal.in_blocks else 1.0)
    # Where cells are narrower than what the losses vary over, the variance that they add is h²/6 a step.
    resolved = min(math.sqrt(12.0 * allowed / (max(place.slope, 1e-300) * law.steps)), coarsest)
    spacings = np.exp(np.linspace(math.log(resolved), math.log(coarsest), 32))
    wrong = added(law, place, goal, spacings, widest)
    misses = np.flatnonzero(wrong > allowed)
    return float(spacings[max(int(misses[0]) - 1, 0)] if misses.size else spacings[-1])


def _widest(counts: Mapping[Term, int], truncation: float) -> float:
    """Returns the widest range of losses of one step."""
    spans = [1e-12]
    for term in counts:
        for _, part in term.parts:
            if part.pair is Pair.ALLOCATION:
                losses = loss_law(part.noise_multiplier, part.steps, truncation).losses
                spans.append(float(losses[-1] - losses[0]))
            elif part.pair is not Pair.RARE:
                pair = mixtures(part)
                ends = pair.loss(np.array(pair.reach(truncation, q=False)))
                spans.append(float(ends[1] - ends[0]))
    return max(spans)
