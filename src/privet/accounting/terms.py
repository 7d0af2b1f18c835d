"""From an event to what an accountant composes: one Gaussian for all that was not sampled, and sampled terms.

Everything that depends on the neighbouring relation, the size of a group and the fallbacks is decided here, once, so
that all accountants bound the same thing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from privet._checks import check_count
from privet.accounting import _special as special
from privet.accounting.event import (
    ClipCountEvent,
    ComposedEvent,
    Event,
    FixedSizeEvent,
    GaussianEvent,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
)
from privet.errors import ConfigurationError

__all__ = ["Pair", "Part", "Reduced", "Term", "gaussian_multiplier", "reduce_event"]


class Pair(enum.Enum):
    """A family of dominating pairs. Shifts are in units of the sum's sensitivity under add-or-remove-one."""

    MIXTURE = "(1-q) N(0, σ²) + q N(1, σ²) against N(0, σ²), in both orders, each composed on its own"
    SYMMETRIC = "the symmetrised profile of MIXTURE at shift 2, composed once"
    REPLACE = "(1-q) N(0, σ²) + q N(-1, σ²) against (1-q) N(0, σ²) + q N(1, σ²)"
    GROUP = "Σ Bin(k, q)(i) N(i, σ²) against N(0, σ²), in both orders"


@dataclass(frozen=True)
class Part:
    """One dominating pair: its family, rate, noise, and for GROUP the number of records."""

    pair: Pair
    rate: float
    noise_multiplier: float
    group_size: int = 1


@dataclass(frozen=True)
class Term:
    """A mixture of parts whose label the adversary may see, with the probability of each. Most terms have one part."""

    parts: tuple[tuple[float, Part], ...]


@dataclass(frozen=True)
class Reduced:
    """What an event amounts to: all unsampled Gaussians as one shift μ, the sampled terms with their counts, notes."""

    squared_mu: float = 0.0
    terms: dict[Term, int] = field(default_factory=dict)
    infinite: bool = False
    notes: tuple[str, ...] = ()


def gaussian_multiplier(event: Event) -> float | None:
    """Returns the noise multiplier of the one Gaussian that equals `event`, or None if it is not Gaussian.

    Several Gaussians on the same batch are one Gaussian: squared shifts add (Dong et al., 1905.02383, corollary 3.3).
    """
    if isinstance(event, GaussianEvent):
        return event.noise_multiplier
    if isinstance(event, ClipCountEvent):
        return _combined([event.noise_multiplier, 2.0 * event.count_noise])
    if isinstance(event, NoEvent):
        return math.inf
    if isinstance(event, SelfComposedEvent):
        if event.count == 0:
            return math.inf
        single = gaussian_multiplier(event.event)
        return None if single is None else single / math.sqrt(event.count)
    if isinstance(event, ComposedEvent):
        multipliers = [gaussian_multiplier(each) for each in event.events]
        known = [each for each in multipliers if each is not None]
        return _combined(known) if len(known) == len(multipliers) else None
    return None


def _combined(multipliers: list[float]) -> float:
    squared = sum((1.0 / each) ** 2 if each > 0.0 else math.inf for each in multipliers)
    return 1.0 / math.sqrt(squared) if squared > 0.0 else math.inf


def _squared_mu(multiplier: float) -> float:
    # Below 1e-150 the square overflows, and ε with it.
    return (1.0 / multiplier) ** 2 if multiplier > 1e-150 else math.inf


class _Reduction:
    def __init__(self, relation: Relation, group_size: int) -> None:
        self.relation = relation
        self.group_size = group_size
        # Replacing a record moves a clipped sum by twice what adding or removing it does.
        self.shift = group_size * (2 if relation is Relation.REPLACE_ONE else 1)
        self.squared_mu = 0.0
        self.terms: dict[Term, int] = {}
        self.infinite = False
        self.notes: dict[str, None] = {}

    def note(self, text: str) -> None:
        self.notes[text] = None

    def gaussian(self, multiplier: float, count: int) -> None:
        squared = _squared_mu(multiplier) * self.shift**2 * count
        if math.isinf(squared):
            self.infinite = True
            self.note("a release without noise (σ = 0): ε is infinite")
        else:
            self.squared_mu += squared

    def term(self, parts: Iterator[tuple[float, Part]], count: int) -> None:
        term = Term(tuple((weight, part) for weight, part in parts if weight > 0.0 and part.rate > 0.0))
        if not term.parts:
            return
        (weight, part), *more = term.parts
        if any(each.noise_multiplier <= 1e-150 for _, each in term.parts):
            self.infinite = True
            self.note("a release without noise (σ = 0): ε is infinite")
        elif math.isinf(part.noise_multiplier):
            return
        elif weight == 1.0 and part.rate == 1.0 and not more and part.pair is not Pair.REPLACE:
            shift = 2 if part.pair is Pair.SYMMETRIC else part.group_size
            self.squared_mu += _squared_mu(part.noise_multiplier) * shift**2 * count
        elif weight == 1.0 and part.rate == 1.0 and not more:
            self.squared_mu += _squared_mu(part.noise_multiplier) * 4.0 * count
        else:
            self.terms[term] = self.terms.get(term, 0) + count

    def add(self, event: Event, count: int) -> None:
        """Adds `count` repetitions of an event."""
        if count == 0 or isinstance(event, NoEvent):
            return
        multiplier = gaussian_multiplier(event)
        if multiplier is not None:
            if math.isfinite(multiplier):
                self.gaussian(multiplier, count)
        elif isinstance(event, NonPrivateEvent):
            self.infinite = True
            self.note("a release without protection: ε is infinite")
        elif isinstance(event, SelfComposedEvent):
            self.add(event.event, count * event.count)
        elif isinstance(event, ComposedEvent):
            for each in event.events:
                self.add(each, count)
        elif isinstance(event, PartitionEvent):
            self.partition(event, count)
        elif isinstance(event, PoissonEvent | TruncatedPoissonEvent | FixedSizeEvent):
            self.sampled(event, count)
        else:
            self.infinite = True
            self.note(f"{type(event).__name__} is not known to this accountant: ε is infinite")

    def partition(self, event: PartitionEvent, count: int) -> None:
        if event.passes and gaussian_multiplier(event.event) is None:
            self.note("a partition of sampled batches is counted as one participation of the inner event a pass")
        if self.relation is Relation.ADD_OR_REMOVE_ONE:
            self.note("a partition is bounded for neighbours in which every other example keeps its batch")
        self.add(event.event, count * event.passes)

    def sampled(self, event: PoissonEvent | TruncatedPoissonEvent | FixedSizeEvent, count: int) -> None:
        multiplier = gaussian_multiplier(event.event)
        rate = event.batch_size / event.dataset_size if isinstance(event, FixedSizeEvent) else event.rate
        if rate == 0.0:
            return
        if multiplier is None:
            # Sampling never makes the loss worse, by quasi-convexity of the hockey-stick divergence in both laws.
            if not isinstance(event.event, NonPrivateEvent):
                self.note(f"sampling around {type(event.event).__name__} is bounded without its amplification")
            self.add(event.event, count)
        elif self.group_size > 1 and not (
            isinstance(event, PoissonEvent) and self.relation is not Relation.REPLACE_ONE
        ):
            self.note(f"a group under {event.kind} sampling and {self.relation.value} is bounded without amplification")
            # Given the draw, at most k members of the batch differ, each by 2: replaced, or in another one's place.
            self.gaussian(multiplier * self.shift / (2 * self.group_size), count)
        elif isinstance(event, PoissonEvent):
            self.term(iter([(1.0, self.poisson(rate, multiplier))]), count)
        elif isinstance(event, FixedSizeEvent) and rate == 1.0:
            self.gaussian(multiplier, count)
        elif isinstance(event, FixedSizeEvent):
            self.term(iter([(1.0, Part(Pair.SYMMETRIC, rate, multiplier))]), count)
        else:
            self.term(self.truncated(event, multiplier), count)

    def poisson(self, rate: float, multiplier: float) -> Part:
        """Returns the dominating pair of a Poisson batch.

        A group of k: Charles et al., arXiv 2407.07737; replace-one: both laws are mixtures over the same batch.
        """
        if self.relation is Relation.REPLACE_ONE:
            return Part(Pair.REPLACE, rate, multiplier)
        if self.group_size > 1:
            return Part(Pair.GROUP, rate, multiplier, self.group_size)
        return Part(Pair.MIXTURE, rate, multiplier)

    def truncated(self, event: TruncatedPoissonEvent, multiplier: float) -> Iterator[tuple[float, Part]]:
        """Yields the two parts of truncated Poisson sampling, by whether the others alone fill the batch.

        Chua et al., arXiv 2411.04205, and Ganesh et al., 2508.15089: let K ~ Bin(n - 1, q) be how many others were
        drawn. If K < cap nothing is cut, and the pair is Poisson's. Otherwise the batch is a uniform choice of the
        others with probability 1 - q', and with probability q' = E[q cap / (K + 1) | K >= cap] it holds the record in
        the place of another one, which is a shift of 2. Under zero-out and replace-one a record stands in that place
        on both sides, as in sampling of fixed size, and the profile is the symmetrised one.
        """
        others = event.dataset_size - 1
        full = float(special.bdtrc(event.cap - 1, others, event.rate)) if others >= event.cap else 0.0
        if full > 0.0:
            over = (
                float(special.bdtrc(event.cap, event.dataset_size, event.rate))
                if event.dataset_size > event.cap
                else 0.0
            )
            # Rounded up: a larger rate is never more private.
            kept = min(1.0, over * event.cap / (full * event.dataset_size) * (1.0 + 1e-9))
            full = min(1.0, full * (1.0 + 1e-9))
            pair = Pair.MIXTURE if self.relation is Relation.ADD_OR_REMOVE_ONE else Pair.SYMMETRIC
            noise = multiplier / 2.0 if pair is Pair.MIXTURE else multiplier
            yield full, Part(pair, kept, noise)
        if full < 1.0:
            yield 1.0 - full, self.poisson(event.rate, multiplier)

    def result(self) -> Reduced:
        if math.isinf(self.squared_mu):
            self.infinite = True
        return Reduced(self.squared_mu, dict(self.terms), self.infinite, tuple(self.notes))


def reduce_event(event: Event, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE, group_size: int = 1) -> Reduced:
    """Returns what an accountant has to compose for `event` under a neighbouring relation and a group size."""
    if not isinstance(event, Event):
        raise ConfigurationError(f"event must be an Event, got {event!r}.")
    if not isinstance(relation, Relation):
        raise ConfigurationError(f"relation must be one of {[str(each) for each in Relation]}, got {relation!r}.")
    reduction = _Reduction(relation, check_count("group_size", group_size, 1))
    reduction.add(event, 1)
    return reduction.result()
