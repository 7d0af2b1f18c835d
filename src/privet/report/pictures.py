"""The pictures of a report: the privacy curve, what an attack can do, and the schedules. None where ε is infinite."""

from __future__ import annotations

import math

from privet.report.described import described
from privet.report.facts import Facts
from privet.report.plots import Curve, Plot
from privet.report.words import number

__all__ = ["attacks_picture", "curve_picture", "schedule_pictures"]

_MOST_POINTS = 400  # of a schedule's picture, which is no wider than that


def curve_picture(facts: Facts) -> list[Plot]:
    """Returns ε over δ."""
    points = tuple((delta, epsilon) for delta, epsilon in reversed(facts.curve) if math.isfinite(epsilon))
    if len(points) < 2:
        return []
    caption = f"ε at most, for each δ. At δ = {facts.delta:g} it is {number(facts.epsilon.upper, digits=3)}."
    return [Plot(caption, "δ", "ε", (Curve(points),), log_x=True)]


def attacks_picture(facts: Facts) -> list[Plot]:
    """Returns the most that any test can reach, with the line of a guess beside it."""
    if not facts.promised:
        return []
    guess = tuple((rate, rate) for rate, _ in facts.receiver)
    caption = (
        "Above the upper line no attack can be. The lower line is a guess that does not look at what was released."
    )
    curves = (Curve(facts.receiver, label="no attack is above"), Curve(guess, label="a mere guess", faint=True))
    return [Plot(caption, "false positive rate", "true positive rate", curves, log_x=True)]


def schedule_pictures(facts: Facts) -> list[Plot]:
    """Returns noise multiplier and sampling rate over the steps, each where it changes."""
    steps, noise, rate = 0, [], []
    for phase in facts.phases:
        words = described(phase.event)
        noise.append((float(steps), words.noise_multiplier))
        rate.append((float(steps), words.rate))
        steps += phase.count
    named = (("noise multiplier", noise), ("sampling rate", rate))
    found = []
    for name, values in named:
        known = [(start, value) for start, value in values if value is not None]
        if len(known) == len(values) and len({value for _, value in known}) > 1:
            every = -(-len(known) // _MOST_POINTS)
            points = (*known[::every], (float(steps), known[-1][1]))
            found.append(Plot(f"The {name} over the steps.", "step", name, (Curve(points, steps=True),)))
    return found
