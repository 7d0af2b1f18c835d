"""From an event to what an accountant composes: one Gaussian for all that was not sampled, and sampled terms.

Everything that depends on the neighbouring relation, the size of a group and the fallbacks is decided here, once, so
that all accountants bound the same thing.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from privet._checks import check_count
from privet.accounting import _special as special
from privet.accounting.correlated import CorrelatedEvent
from privet.accounting.discrete import DiscreteGaussianEvent
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
    RandomAllocationEvent,
    Relation,
    SelfComposedEvent,
    TruncatedPoissonEvent,
)
from privet.errors import ConfigurationError

__all__ = ["ONE_DIRECTION", "Pair", "Part", "Reduced", "Term", "gaussian_multiplier", "reduce_event"]


# Outside these limits a sampled release is bounded by "a record that is drawn is fully disclosed" (RARE), and the whole
# by its Gaussians without amplification. With so little noise a drawn record is told from others nearly always: ε is
# above 200 at once, or the record is not drawn at all.
_LEAST_NOISE = 0.05
# Outside of these limits random allocation is bounded as if who is in which step were known.
_ALLOCATED_NOISE = (0.1, 1e4)
_MOST_STEPS = 2**24
_MOST_NOISE = 1e12
_LEAST_RATE = 1e-30


class Pair(enum.Enum):
    """A family of dominating pairs. Shifts are in units of the sum's sensitivity under add-or-remove-one."""

    MIXTURE = "(1-q) N(0, σ²) + q N(1, σ²) against N(0, σ²), in both orders, each composed on its own"
    RARE = "disclosure with probability q, and nothing otherwise: what bounds every pair in which a record is drawn"
    SYMMETRIC = "the symmetrised profile of MIXTURE at shift 2, composed once"
    REPLACE = "(1-q) N(0, σ²) + q N(-1, σ²) against (1-q) N(0, σ²) + q N(1, σ²)"
    GROUP = "Σ Bin(k, q)(i) N(i, σ²) against N(0, σ²), in both orders"
    ALLOCATION = "(1/t) Σ N(e_j, σ² I) against N(0, σ² I) in t dimensions, in both orders"


ONE_DIRECTION = frozenset({Pair.RARE, Pair.SYMMETRIC, Pair.REPLACE})
"""The pairs whose two directions are the same."""


@dataclass(frozen=True)
class Part:
    """One dominating pair: its family, rate, noise, for GROUP the number of records, for ALLOCATION that of steps."""

    pair: Pair
    rate: float
    noise_multiplier: float
    group_size: int = 1
    steps: int = 1


@dataclass(frozen=True)
class Term:
    """A mixture of parts whose label the adversary may see, with the probability of each. Most terms have one part."""

    parts: tuple[tuple[float, Part], ...]


@dataclass(frozen=True)
class Reduced:
    """What an event amounts to: all unsampled Gaussians as one shift μ, the sampled terms with their counts, notes.

    `unamplified` is μ² of the one Gaussian that everything would be without sampling. It bounds the whole: sampling
    never makes a loss worse, since the hockey-stick divergence is jointly convex. `tight` says whether some two data
    sets attain what is composed; a lower bound on it is a lower bound on ε only then.
    """

    squared_mu: float = 0.0
    terms: dict[Term, int] = field(default_factory=dict)
    infinite: bool = False
    notes: tuple[str, ...] = ()
    unamplified: float = 0.0
    tight: bool = True


def gaussian_multiplier(event: Event) -> float | None:
    """Returns the noise multiplier of the one Gaussian that equals `event`, or None if it is not Gaussian.

    Several Gaussians on the same batch are one Gaussian: squared shifts add (Dong et al., 1905.02383, corollary 3.3).
    """
    if isinstance(event, GaussianEvent):
        return event.noise_multiplier
    if isinstance(event, ClipCountEvent):
        return _combined([event.noise_multiplier, 2.0 * event.count_noise])
    if isinstance(event, CorrelatedEvent | DiscreteGaussianEvent):
        return event.gaussian_multiplier
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


def _relation_inside(event: PoissonEvent | TruncatedPoissonEvent | FixedSizeEvent, relation: Relation) -> Relation:
    """Returns how the batches of two neighbours differ, given the draw.

    A Poisson batch of neighbours that differ in one record differs in that record. A batch of fixed size, or one that
    was cut to its cap, has another record in the place of one that was added or removed: there one is replaced.
    """
    if relation is Relation.ADD_OR_REMOVE_ONE and not isinstance(event, PoissonEvent):
        return Relation.REPLACE_ONE
    return relation


def _tame(part: Part) -> Part:
    """Returns the part, or where its numbers are extreme the plain bound on any pair of its rate."""
    if part.rate == 1.0 or (part.noise_multiplier >= _LEAST_NOISE and part.rate >= _LEAST_RATE):
        return part
    # A group of k is drawn in part with probability at most k q.
    return Part(Pair.RARE, min(1.0, part.rate * part.group_size), 1.0)


class _Reduction:
    def __init__(self, relation: Relation, group_size: int) -> None:
        self.relation = relation
        self.group_size = group_size
        # Replacing a record moves a clipped sum by twice what adding or removing it does.
        self.shift = group_size * (2 if relation is Relation.REPLACE_ONE else 1)
        self.squared_mu = 0.0
        self.unamplified = 0.0
        self.terms: dict[Term, int] = {}
        self.infinite = False
        self.tight = True
        self.notes: dict[str, None] = {}

    def note(self, text: str) -> None:
        self.notes[text] = None

    def without_noise(self) -> None:
        self.infinite = True
        self.note("a release without noise (σ = 0): ε is infinite")

    def gaussian(self, multiplier: float, count: int, *, shift: int) -> None:
        """Adds `count` Gaussian releases that two neighbours move apart by `shift` sensitivities."""
        squared = _squared_mu(multiplier) * shift**2 * count
        if math.isinf(squared):
            self.without_noise()
        else:
            self.squared_mu += squared
            self.unamplified += squared

    def term(self, parts: Iterable[tuple[float, Part]], count: int, *, multiplier: float, shift: int) -> None:
        """Adds `count` releases on a sample, whose Gaussian without sampling would be moved by `shift`."""
        if multiplier <= 1e-150:
            self.without_noise()
            return
        found = tuple((weight, _tame(part)) for weight, part in parts if weight > 0.0 and part.rate > 0.0)
        if not found or math.isinf(multiplier):
            return
        if len(found) == 1 and found[0][0] == 1.0 and found[0][1].rate == 1.0:
            part = found[0][1]
            # A mixture at rate 1 is the Gaussian of its own noise, which knows its shift.
            if part.pair is Pair.MIXTURE:
                multiplier, shift = part.noise_multiplier, 1
            self.gaussian(multiplier, count, shift=shift)
            return
        self.unamplified += _squared_mu(multiplier) * shift**2 * count
        if multiplier > _MOST_NOISE:
            self.tight = False
            self.squared_mu += _squared_mu(multiplier) * shift**2 * count
            return
        # The symmetrised profile and seen labels are bounds that no two data sets need attain.
        self.tight &= len(found) == 1 and found[0][1].pair not in {Pair.SYMMETRIC, Pair.RARE}
        if any(part.pair is Pair.RARE for _, part in found):
            self.note("sampling with σ below 0.05 or a rate below 1e-30 is bounded by full disclosure of who is drawn")
        term = Term(found)
        self.terms[term] = self.terms.get(term, 0) + count

    def add(self, event: Event, count: int) -> None:
        """Adds `count` repetitions of an event."""
        if count == 0 or isinstance(event, NoEvent):
            return
        multiplier = gaussian_multiplier(event)
        if isinstance(event, CorrelatedEvent):
            self.note_of_partition()
        if multiplier is not None:
            if math.isfinite(multiplier):
                self.gaussian(multiplier, count, shift=self.shift)
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
        elif isinstance(event, RandomAllocationEvent):
            self.allocated(event, count)
        elif isinstance(event, PoissonEvent | TruncatedPoissonEvent | FixedSizeEvent):
            self.sampled(event, count)
        else:
            self.infinite = True
            self.note(f"{type(event).__name__} is not known to this accountant: ε is infinite")

    def partition(self, event: PartitionEvent, count: int) -> None:
        if event.passes and gaussian_multiplier(event.event) is None:
            self.note("a partition of sampled batches is counted as one participation of the inner event a pass")
        self.note_of_partition()
        self.add(event.event, count * event.passes)

    def note_of_partition(self) -> None:
        if self.relation is Relation.ADD_OR_REMOVE_ONE:
            self.note("a partition is bounded for neighbours in which every other example keeps its batch")

    def allocated(self, event: RandomAllocationEvent, count: int) -> None:
        """Adds passes of random allocation: one Gaussian with 1/t of each shift, or the same as if all were known.

        Chua et al., arXiv 2412.16802, and Feldman and Shenfeld, 2502.08202: for one record that is added, removed or
        zeroed the pair dominates, whatever the other records do, as their steps are chosen apart from its own.
        """
        multiplier = gaussian_multiplier(event.event)
        if multiplier is None:
            self.note("random allocation of sampled batches is counted as one participation of the inner event a pass")
            self.tight = False
            self.add(event.event, count)
            return
        known = ""
        if self.relation is Relation.REPLACE_ONE or self.group_size > 1:
            known = self.relation.value if self.group_size == 1 else f"a group of {self.group_size}"
        elif not _ALLOCATED_NOISE[0] <= multiplier <= _ALLOCATED_NOISE[1] and math.isfinite(multiplier):
            known = f"σ outside of {_ALLOCATED_NOISE[0]:g} to {_ALLOCATED_NOISE[1]:g}"
        elif event.steps > _MOST_STEPS:
            known = f"more than {_MOST_STEPS} steps"
        if known:
            self.note(f"random allocation with {known} is bounded as if who is in which step were known")
            self.tight = False
            self.gaussian(multiplier, count, shift=self.shift)
            return
        rate = 1.0 / event.steps
        pair = Pair.MIXTURE if event.steps == 1 else Pair.ALLOCATION
        part = Part(pair, rate, multiplier, steps=event.steps)
        self.term([(1.0, part)], count, multiplier=multiplier, shift=self.shift)

    def sampled(self, event: PoissonEvent | TruncatedPoissonEvent | FixedSizeEvent, count: int) -> None:
        multiplier = gaussian_multiplier(event.event)
        rate = event.batch_size / event.dataset_size if isinstance(event, FixedSizeEvent) else event.rate
        if rate == 0.0:
            return
        relation = _relation_inside(event, self.relation)
        shift = self.group_size * (2 if relation is Relation.REPLACE_ONE else 1)
        if multiplier is None:
            self.within(event, relation, count)
        elif self.group_size > 1 and not (isinstance(event, PoissonEvent) and relation is not Relation.REPLACE_ONE):
            self.note(f"a group under {event.kind} sampling and {self.relation.value} is bounded without amplification")
            # Given the draw, at most k members of the batch differ.
            self.tight = False
            self.gaussian(multiplier, count, shift=shift)
        elif isinstance(event, PoissonEvent):
            self.term([(1.0, self.poisson(rate, multiplier))], count, multiplier=multiplier, shift=shift)
        elif isinstance(event, FixedSizeEvent):
            self.term([(1.0, self.fixed_size(rate, multiplier))], count, multiplier=multiplier, shift=shift)
        else:
            self.term(self.truncated(event, multiplier), count, multiplier=multiplier, shift=shift)

    def within(self, event: PoissonEvent | TruncatedPoissonEvent | FixedSizeEvent, relation: Relation, n: int) -> None:
        """Adds a sampled event that is not Gaussian inside, without the sampling's amplification.

        Sampling never makes the loss worse, by quasi-convexity of the hockey-stick divergence in both laws; but the
        batches of two neighbours are neighbours under the relation that holds inside.
        """
        if not isinstance(event.event, NonPrivateEvent):
            self.note(f"sampling around {type(event.event).__name__} is bounded without its amplification")
        self.tight = False
        inner = _Reduction(relation, self.group_size)
        inner.add(event.event, n)
        self.squared_mu += inner.squared_mu
        self.unamplified += inner.unamplified
        self.infinite |= inner.infinite
        self.notes |= inner.notes
        for term, count in inner.terms.items():
            self.terms[term] = self.terms.get(term, 0) + count

    def fixed_size(self, rate: float, multiplier: float) -> Part:
        """Returns the dominating pair of a batch of fixed size: another record stands in the place of the record.

        Under add-or-remove-one the law without the record is the law of the smaller data set itself, so that the pair
        is a mixture at shift 2 in both orders; `rate` counts the larger data set. Under zero-out and replace-one both
        sides are mixtures, and the profile is the symmetrised one (decision 13).
        """
        if self.relation is Relation.ADD_OR_REMOVE_ONE:
            return Part(Pair.MIXTURE, rate, multiplier / 2.0)
        return Part(Pair.SYMMETRIC, rate, multiplier)

    def poisson(self, rate: float, multiplier: float) -> Part:
        """Returns the dominating pair of a Poisson batch.

        A group of k: Charles et al., arXiv 2407.07737, and Ganesh, arXiv 2401.10294, in both directions; replace-one:
        both laws are mixtures over the same batch.
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
        return Reduced(
            self.squared_mu, dict(self.terms), self.infinite, tuple(self.notes), self.unamplified, self.tight
        )


def reduce_event(event: Event, *, relation: Relation = Relation.ADD_OR_REMOVE_ONE, group_size: int = 1) -> Reduced:
    """Returns what an accountant has to compose for `event` under a neighbouring relation and a group size."""
    if not isinstance(event, Event):
        raise ConfigurationError(f"event must be an Event, got {event!r}.")
    if not isinstance(relation, Relation):
        raise ConfigurationError(f"relation must be one of {[str(each) for each in Relation]}, got {relation!r}.")
    reduction = _Reduction(relation, check_count("group_size", group_size, 1))
    reduction.add(event, 1)
    if _discrete(event):  # the Gaussian that bounds it is not attained
        reduction.tight = False
    return reduction.result()


def _discrete(event: Event) -> bool:
    """Returns whether noise on a grid is anywhere in an event."""
    inside = (*getattr(event, "events", ()), *([event.event] if hasattr(event, "event") else ()))
    return isinstance(event, DiscreteGaussianEvent) or any(
        _discrete(each) for each in inside if isinstance(each, Event)
    )
