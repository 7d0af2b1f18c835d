"""Events: frozen descriptions of what was released. Everything in them is public knowledge.

An event says which mechanism ran, on which sample, how often. It says nothing about who is protected: the
neighbouring relation and the unit of privacy are given to the accountant. `noise_multiplier` is always the standard
deviation of the noise over the sensitivity under add-or-remove-one; accountants double the sensitivity where the
relation does.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, runtime_checkable

from privet._checks import check_at_least, check_count, check_positive, check_probability
from privet.errors import ConfigurationError

__all__ = [
    "ClipCountEvent",
    "ComposedEvent",
    "DrawnOnce",
    "Event",
    "FixedSizeEvent",
    "GaussianEvent",
    "NegativeBinomialSelectionEvent",
    "NoEvent",
    "NonPrivateEvent",
    "PartitionEvent",
    "PoissonEvent",
    "PoissonSelectionEvent",
    "RandomAllocationEvent",
    "Relation",
    "SelfComposedEvent",
    "TruncatedPoissonEvent",
    "Unit",
    "WholePhase",
    "repeated",
]

_LEAST_SUCCESS = 1e-100  # nobody runs anything so often; below it the formulas leave the range of float64


class Relation(enum.Enum):
    """Which two data sets are neighbours.

    Under `ZERO_OUT` one record is replaced by one that contributes nothing but keeps its place, so that the size of
    the data set is the same on both sides and may be public.
    """

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"
    ZERO_OUT = "zero_out"


class Unit(enum.Enum):
    """What "one" is: whose data the neighbouring relation adds, removes, replaces or zeroes.

    A unit is said with ε, kept in ledgers and their states, and compared before two are joined. No accountant reads it
    or converts one unit into another: an event must already be about sums whose sensitivity is bounded for this unit.
    """

    EXAMPLE = "example"
    SEQUENCE = "sequence"
    USER = "user"
    GROUP = "group"


class Event:
    """One release, or several. A subclass is a frozen dataclass and names itself: `class Mine(Event, kind="mine")`."""

    kind: ClassVar[str] = ""
    needs_separation: ClassVar[bool] = (
        False  # whether it costs nothing known until a sampling keeps an example's steps apart
    )
    _kinds: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls, *, kind: str) -> None:
        """Registers the subclass under its name in JSON."""
        super().__init_subclass__()
        taken = Event._kinds.get(kind)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ConfigurationError(f"The event kind {kind!r} is taken by {taken.__qualname__}; choose another name.")
        cls.kind = kind
        Event._kinds[kind] = cls

    def to_dict(self) -> dict[str, object]:
        """Returns the event as plain values that JSON keeps exactly."""
        values: dict[str, object] = {"kind": self.kind}
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            values[field.name] = _plain(getattr(self, field.name))
        return values

    @staticmethod
    def from_dict(values: object) -> Event:
        """Returns the event that `to_dict` described; an unknown kind or field is an error."""
        if not isinstance(values, Mapping) or values.get("kind") not in Event._kinds:
            found = values.get("kind") if isinstance(values, Mapping) else values
            raise ConfigurationError(f"An event must have a kind among {sorted(Event._kinds)}, got {found!r}.")
        cls = Event._kinds[str(values["kind"])]
        given = {key: _revived(value) for key, value in values.items() if key != "kind"}
        expected = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(given) != expected:
            raise ConfigurationError(f"{cls.__name__} has the fields {sorted(expected)}, got {sorted(given)}.")
        return cls(**given)


def _plain(value: object) -> object:
    if isinstance(value, Event):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _revived(value: object) -> object:
    if isinstance(value, Mapping):
        return Event.from_dict(value)
    if isinstance(value, list | tuple):
        return tuple(_revived(item) for item in value)
    return value


def _check_event(name: str, value: object) -> Event:
    if not isinstance(value, Event):
        raise ConfigurationError(f"{name} must be an Event, got {value!r}.")
    if value.needs_separation:
        raise ConfigurationError(
            "the noise is correlated over steps, and this sampling may draw an example at steps that are close to each "
            "other, for which no bound is known. Expected a sampling that keeps the steps of an example apart. Use a "
            "partition in a fixed order, Partition(batch_size=..., dataset_size=n), or independent noise: Gaussian."
        )
    return value


def _set(target: Event, /, **values: object) -> None:
    """Stores checked values in a frozen dataclass that is still being made."""
    for name, value in values.items():
        object.__setattr__(target, name, value)


@dataclass(frozen=True)
class NoEvent(Event, kind="none"):
    """Nothing was released: ε is 0."""


@dataclass(frozen=True)
class NonPrivateEvent(Event, kind="non_private"):
    """Something was released without protection: ε is infinite."""


@dataclass(frozen=True)
class GaussianEvent(Event, kind="gaussian"):
    """A sum with Gaussian noise of standard deviation `noise_multiplier` times its sensitivity."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        _set(self, noise_multiplier=check_at_least("noise_multiplier", self.noise_multiplier))


@dataclass(frozen=True)
class ClipCountEvent(Event, kind="clip_count"):
    """A noisy sum of gradients, and with it adaptive clipping's noisy count of those that were not clipped.

    Andrew et al., arXiv 1905.03871, section 3: every example adds +1/2 or -1/2 to the recentred count, so its
    sensitivity is 1/2 and `count_noise` is the standard deviation of the noise on the count itself.
    """

    noise_multiplier: float
    count_noise: float

    def __post_init__(self) -> None:
        _set(self, noise_multiplier=check_at_least("noise_multiplier", self.noise_multiplier))
        _set(self, count_noise=check_at_least("count_noise", self.count_noise))


@dataclass(frozen=True)
class PoissonEvent(Event, kind="poisson"):
    """`event` on a batch that each example joins independently with probability `rate`."""

    rate: float
    event: Event

    def __post_init__(self) -> None:
        _set(self, rate=check_probability("rate", self.rate), event=_check_event("event", self.event))


@dataclass(frozen=True)
class TruncatedPoissonEvent(Event, kind="truncated_poisson"):
    """`event` on a Poisson batch from which, where it is larger than `cap`, a uniform choice of `cap` is kept.

    `dataset_size` counts the larger of two neighbours under add-or-remove-one.
    """

    rate: float
    cap: int
    dataset_size: int
    event: Event

    def __post_init__(self) -> None:
        _set(self, rate=check_probability("rate", self.rate), cap=check_count("cap", self.cap, 1))
        _set(self, dataset_size=check_count("dataset_size", self.dataset_size, 1))
        _set(self, event=_check_event("event", self.event))


@dataclass(frozen=True)
class FixedSizeEvent(Event, kind="fixed_size"):
    """`event` on a batch of exactly `batch_size` of `dataset_size` examples, chosen uniformly without replacement."""

    batch_size: int
    dataset_size: int
    event: Event

    def __post_init__(self) -> None:
        _set(self, dataset_size=check_count("dataset_size", self.dataset_size, 1))
        _set(self, batch_size=check_count("batch_size", self.batch_size, 0))
        if self.batch_size > self.dataset_size:
            raise ConfigurationError(
                f"batch_size must be at most dataset_size = {self.dataset_size}, got {self.batch_size}."
            )
        _set(self, event=_check_event("event", self.event))


@dataclass(frozen=True)
class PartitionEvent(Event, kind="partition"):
    """`event` on every batch of a partition of the data, in any fixed or shuffled order, `passes` times over.

    Each example takes part once a pass, whatever the number of batches: k passes of a Gaussian are k participations,
    a Gaussian mechanism with μ = √k / noise_multiplier. Nothing is amplified by the order.
    """

    passes: int
    event: Event

    def __post_init__(self) -> None:
        _set(self, passes=check_count("passes", self.passes), event=_check_event("event", self.event))

    def whole_phase(self, count: int) -> Event:
        """Returns the event of `count` repetitions: so many more passes."""
        return PartitionEvent(self.passes * count, self.event)


@dataclass(frozen=True)
class RandomAllocationEvent(Event, kind="random_allocation"):
    """One pass of `steps` steps with `event` on each, where each example is in one of them, chosen at random.

    Every step is as likely as any other, whatever the other examples are in: "balls in bins". So the sizes of batches
    are random and secret. Another pass is another event, whose choices are drawn anew.
    """

    steps: int
    event: Event

    def __post_init__(self) -> None:
        _set(self, steps=check_count("steps", self.steps, 1), event=_check_event("event", self.event))

    def rest_of_pass(self) -> Event:
        """Returns the event of the rest of a pass whose first part was another event: one participation, not amplified.

        Who is in which step is drawn once a pass, and the first part has told of it.
        """
        return PartitionEvent(1, self.event)


@dataclass(frozen=True)
class ComposedEvent(Event, kind="composed"):
    """Several events on the same data.

    A mechanism may depend on what the earlier ones released, as a gradient depends on the weights. Its noise
    multiplier, its rate and how many there are may not: they are fixed beforehand, or follow public numbers. ε of a
    composition is not a bound where they were chosen by looking at what was released.
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        try:
            events = tuple(self.events)
        except TypeError:
            raise ConfigurationError(f"events must be a sequence of events, got {self.events!r}.") from None
        _set(self, events=tuple(_check_event("each of events", event) for event in events))


@dataclass(frozen=True)
class SelfComposedEvent(Event, kind="self_composed"):
    """`event`, `count` times over."""

    event: Event
    count: int

    def __post_init__(self) -> None:
        _set(self, event=_check_event("event", self.event), count=check_count("count", self.count))


@dataclass(frozen=True)
class PoissonSelectionEvent(Event, kind="poisson_selection"):
    """The best of K runs of `event`, where K is secret and Poisson with this mean; K = 0 releases that there was none.

    Papernot and Steinke, arXiv 2110.03620. `event` is one run as a whole: it draws its hyperparameters from a fixed
    public distribution, trains, and gives its result a score. The score is a function of what the run releases and of
    public data, or `event` includes what the score costs. Nothing else of any run is released.

    Example:
        >>> from privet.accounting import GaussianEvent, PoissonSelectionEvent, get_epsilon
        >>> one_run = GaussianEvent(4.0)
        >>> get_epsilon(one_run, 1e-6) < get_epsilon(PoissonSelectionEvent(10.0, one_run), 1e-6) < 3.5
        True
    """

    mean: float
    event: Event

    def __post_init__(self) -> None:
        _set(self, mean=check_positive("mean", self.mean), event=_check_event("event", self.event))

    @property
    def mean_runs(self) -> float:
        """The mean of K."""
        return self.mean


@dataclass(frozen=True)
class NegativeBinomialSelectionEvent(Event, kind="negative_binomial_selection"):
    """The best of K >= 1 runs of `event`, where K is secret and truncated negative binomial; runs as for Poisson's law.

    Papernot and Steinke, arXiv 2110.03620, definition 1. `shape` is their η > -1 and `success` their γ in (0, 1):
    P(K = k) is proportional to (1 - γ)^k Π (ℓ + η) / (ℓ + 1) over ℓ < k. A shape of 1 is the geometric law, with mean
    1 / γ; a shape of 0 is the logarithmic law.
    """

    shape: float
    success: float
    event: Event

    def __post_init__(self) -> None:
        given: object = self.shape
        success = check_positive("success", self.success)
        if isinstance(given, bool) or not isinstance(given, int | float) or not -1.0 < given < math.inf:
            raise ConfigurationError(f"shape must be a finite number above -1, got {given!r}.")
        if not _LEAST_SUCCESS <= success < 1.0:
            raise ConfigurationError(
                f"success must be a number of at least {_LEAST_SUCCESS:g} and below 1, got {self.success!r}."
            )
        _set(self, shape=float(given), success=success, event=_check_event("event", self.event))

    @property
    def mean_runs(self) -> float:
        """The mean of K: η (1 - γ) / (γ (1 - γ^η)), and at η = 0 its limit (1 / γ - 1) / log(1 / γ)."""
        log_success, odds = math.log(self.success), (1.0 - self.success) / self.success
        exponent = self.shape * log_success
        return odds / -log_success if exponent == 0.0 else self.shape * odds / -math.expm1(exponent)


@runtime_checkable
class WholePhase(Protocol):
    """A mechanism, often an event itself, whose repetitions are one event of their own, not a composition of steps."""

    def whole_phase(self, count: int) -> Event:
        """Returns the event of `count` steps or passes taken together."""


@runtime_checkable
class DrawnOnce(Protocol):
    """An event of a whole pass whose amplification rests on a draw that its steps share."""

    def rest_of_pass(self) -> Event:
        """Returns what the rest of a pass costs whose first part was another event."""


def repeated(event: Event, count: int) -> Event:
    """Returns the event of `count` repetitions of `event`: its own whole phase where it has one."""
    check_count("count", count)
    if count == 0:
        return NoEvent()
    if isinstance(event, WholePhase):
        return event.whole_phase(count)
    return event if count == 1 else SelfComposedEvent(event, count)
