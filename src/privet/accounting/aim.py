"""Where on the curve to compose, and whether what came back is good enough: the judgement of the "pld" accountant.

Nothing here bounds anything. A bad choice makes an answer loose, never wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from privet.accounting.goal import Place
from privet.accounting.grid import Grid
from privet.accounting.moments import Law
from privet.accounting.profile import Answer
from privet.accounting.terms import Term

__all__ = ["content", "eased", "first_place", "followed", "heavy_place", "place_of_epsilon", "unfit"]


def content(grid: Grid, counts: Mapping[Term, int]) -> float:
    """Returns at how many tolerances an answer is good enough: more where a better one is not to be had, or is dear."""
    if grid.limited or grid.goal.splits:
        return 20.0
    return 1.5 if len(counts) < 32 else 6.0


def unfit(answers: list[Answer], both: tuple[Law, ...], grid: Grid, tolerance: float) -> set[int]:
    """Returns the directions whose answers are worse than `tolerance`, among those that decide the maximum."""
    highest = max(each.epsilon for each in answers)
    found = set()
    for side, (answer, place) in enumerate(zip(answers, grid.goal.places, strict=True)):
        if answer.epsilon < highest * (1.0 - tolerance) or highest == 0.0:
            continue
        if not answer.inside or math.isinf(answer.epsilon):
            found.add(side)
            continue
        slope = max(answer.slope, 1e-300)
        added = grid.added(both[min(side, len(both) - 1)], replace(place, slope=slope))
        if answer.lost / slope + added > tolerance * max(answer.epsilon, 1e-7):
            found.add(side)
    return found


def first_place(law: Law, delta: float, epsilon: float, tilt: float) -> Place:
    """Returns where to compose first: at the saddle point, or apart from rare heavy losses where these decide δ."""
    jump, slope = law.jump(delta)
    if law.steps == 1:
        return Place(0.0, jump, slope)
    return heavy_place(law, delta, jump, slope, tilt) or Place(tilt, max(epsilon, 0.0), tilt)


def place_of_epsilon(law: Law, epsilon: float) -> Place:
    """Returns the same for a given ε."""
    jump, slope = law.jump_delta(epsilon)
    if law.steps == 1:
        return Place(0.0, epsilon, slope)
    tilt = law.log_delta(epsilon)[1]
    return heavy_place(law, jump, epsilon, slope, tilt) or Place(tilt, epsilon, tilt)


def heavy_place(law: Law, delta: float, epsilon: float, slope: float, tilt: float) -> Place | None:
    """Returns where to compose rare heavy losses apart, or None where δ is not decided by one of them.

    At the saddle point one of many steps has a large loss then, and the others next to none. Where several share in ε,
    the saddle point is the better place.
    """
    if epsilon <= 0.0 or delta <= 1e-300:
        return None
    split = law.split(delta, epsilon)
    if split is None or law.expected_above(split[0], tilt) > 1.5:
        return None
    return Place(0.0, epsilon, slope, *split)


def eased(places: tuple[Place, ...], log_delta: float) -> tuple[Place, ...]:
    """Returns the places, with a smaller tilt where a direction only has to be shown to stay far below the other.

    A tilt of 2 log(1/δ) / ε shows that, if anything does; a larger one would need a spacing of its own.
    """
    highest = max(place.epsilon for place in places)
    enough = -2.0 * log_delta / max(highest, 1e-300)
    return tuple(
        replace(place, tilt=enough, slope=enough) if place.epsilon < 0.5 * highest and place.tilt > enough else place
        for place in places
    )


def followed(place: Place, answer: Answer, start: tuple[float, float], *, lacking: bool) -> Place:
    """Returns where to compose next: at the answer, with the slope that was found there."""
    if math.isfinite(place.split):
        if answer.inside and answer.lost < 0.05:
            return replace(place, epsilon=answer.epsilon, slope=answer.slope)
        return Place(start[1], max(start[0], 0.0), start[1])
    if not answer.inside:
        # The window lay beside the answer: the losses that matter are smaller than those of this tilt.
        epsilon = answer.epsilon if math.isfinite(answer.epsilon) else place.epsilon
        return Place(place.tilt / 3.0, epsilon * 0.9, place.slope / 3.0)
    tilt = place.tilt
    if lacking and answer.lost > 1e-3 * max(1.0, answer.slope * answer.epsilon):
        tilt = answer.slope
    return Place(tilt, answer.epsilon, answer.slope)
