"""Events in words and in the few numbers that a plot can show: which sampler, which mechanism, how much noise."""

from __future__ import annotations

from dataclasses import dataclass

from privet.accounting import (
    ClipCountEvent,
    ComposedEvent,
    CorrelatedEvent,
    CorrelatedRelease,
    DiscreteGaussianEvent,
    Event,
    FixedSizeEvent,
    GaussianEvent,
    NegativeBinomialSelectionEvent,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    Phase,
    PoissonEvent,
    PoissonSelectionEvent,
    RandomAllocationEvent,
    SelfComposedEvent,
    TruncatedPoissonEvent,
)

__all__ = ["Described", "described", "holds_selection", "known_size"]


@dataclass(frozen=True)
class Described:
    """A phase in words.

    Attributes:
        name: of the sampler, in a word or two.
        sampler: how its batches were formed, in one sentence.
        mechanism: what was released of each batch.
        noise_multiplier: standard deviation of the noise over the sensitivity, where the phase has one such number.
        rate: the sampling rate, where the phase has one; 1 without sampling.
    """

    name: str
    sampler: str
    mechanism: str
    noise_multiplier: float | None
    rate: float | None


def described(event: Event) -> Described:
    """Returns the words and numbers of an event; of one that is not known, its name."""
    if isinstance(event, GaussianEvent):
        return Described(
            "none", "no sampling: every record may be in the batch", _gaussian(event), event.noise_multiplier, 1.0
        )
    if isinstance(event, DiscreteGaussianEvent):
        what = (
            "the sum of clipped gradients, rounded to a grid, with discrete Gaussian noise of "
            f"{event.noise_multiplier:g} times its sensitivity"
        )
        return Described("none", "no sampling: every record may be in the batch", what, event.noise_multiplier, 1.0)
    if isinstance(event, ClipCountEvent):
        what = f"{_gaussian(event)}, and a noisy count of clipped gradients (noise {event.count_noise:g})"
        return Described("none", "no sampling: every record may be in the batch", what, event.noise_multiplier, 1.0)
    if isinstance(event, PoissonEvent):
        words = f"Poisson sampling: each record joins each batch independently with probability {event.rate:g}"
        return _around(event.event, "Poisson", words, event.rate)
    if isinstance(event, TruncatedPoissonEvent):
        words = (
            f"truncated Poisson sampling at rate {event.rate:g}; batches above {event.cap} of {event.dataset_size} "
            "records are cut to that size at random"
        )
        return _around(event.event, "truncated Poisson", words, event.rate)
    if isinstance(event, FixedSizeEvent):
        words = f"batches of exactly {event.batch_size} of {event.dataset_size} records, drawn without replacement"
        return _around(event.event, "fixed size", words, event.batch_size / event.dataset_size)
    if isinstance(event, PartitionEvent):
        words = (
            "a pass over the data in batches, in order or shuffled: each record takes part once a pass, and nothing "
            "is amplified by sampling"
        )
        return _around(event.event, "partition", words, 1.0)
    if isinstance(event, RandomAllocationEvent):
        words = (
            f"random allocation: in a pass of {event.steps} batches, each record is in one of them, chosen at random "
            "and apart from all others"
        )
        return _around(event.event, "random allocation", words, 1.0 / event.steps)
    if isinstance(event, CorrelatedEvent):
        words = (
            "a pass over the data in batches, in a fixed order: each record takes part once in every "
            f"{event.separation} steps, and nothing is amplified by sampling"
        )
        return _around(event.event, "partition in a fixed order", words, 1.0)
    if isinstance(event, CorrelatedRelease):
        what = (
            f"{_gaussian(event)} in one participation, correlated over steps: a part of the noise of earlier steps is "
            "taken back"
        )
        return Described("not known", "not known", what, event.noise_multiplier, 1.0)
    if isinstance(event, PoissonSelectionEvent | NegativeBinomialSelectionEvent):
        inner = described(event.event)
        law = (
            "Poisson"
            if isinstance(event, PoissonSelectionEvent)
            else f"truncated negative binomial, shape {event.shape:g}, success {event.success:g}"
        )
        what = (
            f"the best of a secret, random number of runs ({law}; {event.mean_runs:.4g} on average); of each run: "
            f"{inner.mechanism}"
        )
        return Described(
            f"{inner.name}, the best of several runs", inner.sampler, what, inner.noise_multiplier, inner.rate
        )
    if isinstance(event, SelfComposedEvent):
        inner = described(event.event)
        return Described(
            inner.name, inner.sampler, f"{event.count} times: {inner.mechanism}", inner.noise_multiplier, inner.rate
        )
    if isinstance(event, ComposedEvent):
        return _together([described(each) for each in event.events])
    if isinstance(event, NoEvent):
        return Described("none", "none", "nothing", None, None)
    if isinstance(event, NonPrivateEvent):
        return Described("none", "none", "a release without protection", None, None)
    return Described("not known", "not known", f"an event of the kind {event.kind}", None, None)


def _gaussian(event: GaussianEvent | ClipCountEvent | CorrelatedRelease) -> str:
    return (
        f"the sum of clipped gradients with Gaussian noise of {event.noise_multiplier:g} times its sensitivity"
        if event.noise_multiplier > 0.0
        else "the sum of clipped gradients without any noise"
    )


def _around(inner: Event, name: str, sampler: str, rate: float) -> Described:
    """Returns a sampled event: its own sampler, and the one inside where that is another one."""
    found = described(inner)
    one = found.rate == 1.0
    words = sampler if one else f"{sampler}; inside it: {found.sampler}"
    return Described(name, words, found.mechanism, found.noise_multiplier, rate if one else None)


def _together(parts: list[Described]) -> Described:
    """Returns several events on the same data as one: numbers that they do not share are left out."""

    def shared(values: list[float | None]) -> float | None:
        return values[0] if len(set(values)) == 1 else None

    return Described(
        " and ".join(dict.fromkeys(part.name for part in parts)) or "none",
        "; ".join(dict.fromkeys(part.sampler for part in parts)) or "none",
        "; and ".join(dict.fromkeys(part.mechanism for part in parts)) or "nothing",
        shared([part.noise_multiplier for part in parts]) if parts else None,
        shared([part.rate for part in parts]) if parts else None,
    )


def _within(event: Event) -> list[Event]:
    """Returns the event and every event inside of it."""
    found, waiting = [], [event]
    while waiting:
        each = waiting.pop()
        found.append(each)
        waiting += [value for value in vars(each).values() if isinstance(value, Event)]
        if isinstance(each, ComposedEvent):
            waiting += each.events
    return found


def holds_selection(phases: tuple[Phase, ...]) -> bool:
    """Returns whether a choice among several runs is on record."""
    selections = PoissonSelectionEvent | NegativeBinomialSelectionEvent
    return any(isinstance(each, selections) for phase in phases for each in _within(phase.event))


def known_size(phases: tuple[Phase, ...]) -> int | None:
    """Returns the number of records that the events themselves name, the least where they differ; None without one."""
    sized = TruncatedPoissonEvent | FixedSizeEvent
    sizes = [each.dataset_size for phase in phases for each in _within(phase.event) if isinstance(each, sized)]
    return min(sizes, default=None)
