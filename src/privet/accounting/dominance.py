"""Events that are never more private than others: what a budget may count in the place of what ran.

Three events are touched, alone or inside one another: a Gaussian, a Poisson batch of Gaussians, and passes of a
partition. Every other event only stands for itself.

* Less noise is never more private: the sum with noise of σ' > σ is the sum with noise of σ, to which independent noise
  is added. Sampling and partitions around it change nothing, since the noise is added to each batch's sum.
* A larger rate is never more private. Under each relation the pair of a Poisson batch at rate q is a mixture: with
  probability q/q' the pair at rate q' >= q, else twice the same law. The hockey-stick divergence is jointly convex,
  and 0 between equal laws (Balle, Barthe and Gaboardi, arXiv 1807.01647, section 2).
* Composition keeps the order: each factor may be replaced by one that dominates it (Zhu, Dong and Wang, arXiv
  2106.08567, theorem 10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from privet.accounting.event import Event, GaussianEvent, PartitionEvent, PoissonEvent

__all__ = ["coarser", "dominates", "drift", "rounded", "shape", "worst"]

_LARGEST_NOISE = 1e100  # beyond the range in which a logarithm's rounding is far below any grid


def shape(event: Event) -> object:
    """Returns what two events must have in common for one of them to be able to dominate the other."""
    # Exact types: a subclass may mean something else.
    if type(event) is GaussianEvent:
        return GaussianEvent
    if type(event) is PoissonEvent and type(event.event) is GaussianEvent:
        return PoissonEvent
    if type(event) is PartitionEvent and type(event.event) is GaussianEvent:
        return (PartitionEvent, event.passes)
    return event


def _numbers(event: Event) -> tuple[float, float]:
    """Returns (noise multiplier, rate) of an event whose shape is not the event itself."""
    if isinstance(event, GaussianEvent):
        return event.noise_multiplier, 1.0
    assert isinstance(event, PoissonEvent | PartitionEvent)
    assert isinstance(event.event, GaussianEvent)
    return event.event.noise_multiplier, event.rate if isinstance(event, PoissonEvent) else 1.0


def _with(event: Event, noise: float, rate: float) -> Event:
    """Returns an event of the same shape with other numbers."""
    if isinstance(event, PoissonEvent):
        return PoissonEvent(rate, GaussianEvent(noise))
    if isinstance(event, PartitionEvent):
        return replace(event, event=GaussianEvent(noise))
    return GaussianEvent(noise)


def dominates(one: Event, other: Event) -> bool:
    """Returns whether `other` is known to be at least as private as `one`, under every relation."""
    if one == other:
        return True
    if shape(one) != shape(other) or shape(one) == one:
        return False
    (noise, rate), (other_noise, other_rate) = _numbers(one), _numbers(other)
    return noise <= other_noise and rate >= other_rate


def worst(events: Iterable[Event], *, margin: tuple[float, float] = (0.0, 0.0)) -> Event:
    """Returns an event that dominates all of `events`, which are of one shape.

    Args:
        events: at least one.
        margin: how much less noise and how much more of a rate than needed, as differences of logarithms.
    """
    first, *others = events
    if shape(first) == first:
        return first
    numbers = [_numbers(event) for event in (first, *others)]
    noise = min(noise for noise, _ in numbers)
    rate = max(rate for _, rate in numbers)
    return _with(first, noise * math.exp(-margin[0]), min(1.0, rate * math.exp(margin[1])))


def drift(early: Event, late: Event) -> tuple[float, float]:
    """Returns by how much noise fell and the rate rose between two events of one shape, as differences of logarithms.

    What went the other way counts as 0, and so does a number that is 0 or infinite.
    """
    if shape(early) == early:
        return 0.0, 0.0
    (noise, rate), (late_noise, late_rate) = _numbers(early), _numbers(late)
    return _log_ratio(noise, late_noise), _log_ratio(late_rate, rate)


def _log_ratio(larger: float, smaller: float) -> float:
    return math.log(larger) - math.log(smaller) if larger > smaller > 0.0 else 0.0


def rounded(event: Event, width: float) -> Event:
    """Returns an event on a geometric grid of a relative width that dominates `event`: σ down, rate up."""
    if shape(event) == event:
        return event
    noise, rate = _numbers(event)
    down = _down(noise, width)
    up = 1.0 if rate >= 1.0 else min(1.0, -_down(-rate, width))
    return _with(event, down, up)


def _down(value: float, width: float) -> float:
    """Returns the grid's number of at most `value`. Numbers below 0 have the mirrored grid, so that it rounds up."""
    size = abs(value)
    if not 1.0 / _LARGEST_NOISE < size < _LARGEST_NOISE:
        return value
    index = math.log(size) / math.log1p(width)
    whole = math.floor(index) if value > 0.0 else math.ceil(index)
    found = math.copysign(math.exp(whole * math.log1p(width)), value)
    while found > value:  # a rounding of the logarithm: one step is far more than it
        whole += -1 if value > 0.0 else 1
        found = math.copysign(math.exp(whole * math.log1p(width)), value)
    return found


def coarser(counts: Mapping[Event, int], width: float) -> dict[Event, int]:
    """Returns counts of fewer different events that dominate these together."""
    found: dict[Event, int] = {}
    for event, count in counts.items():
        grid = rounded(event, width)
        found[grid] = found.get(grid, 0) + count
    return found
