"""From an event to pairs of laws, derived anew: nothing of `privet.accounting.terms` is used.

Two kinds of answer. `floors` are pairs that some data and some mechanism with the stated sensitivity really reach, so
that no claim may lie below them. `ceilings` are proven bounds, so that no lower bound may lie above the least of them.
All shifts are in units of the sensitivity of the sum under add-or-remove-one, σ is the noise multiplier. P is the
output with the record (for replace-one: with one of the two), Q without.

The data of a floor. "Still": every other record contributes 0. "Opposed": every other record contributes -1 and the
record +1, so that taking another one's place moves the sum by 2. Each step may be of either kind: a mechanism may look
at what was released, and so may the gradients.
"""

from __future__ import annotations

from typing import NamedTuple

from oracle_contour import Composition
from oracle_laws import POINT, Law, Pair, Step, Symmetric, step
from scipy.special import bdtrc
from scipy.stats import binom, hypergeom

from privet.accounting import (
    ClipCountEvent,
    ComposedEvent,
    FixedSizeEvent,
    GaussianEvent,
    NoEvent,
    NonPrivateEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    SelfComposedEvent,
)

ADD, REPLACE, ZERO = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE, Relation.ZERO_OUT
FLOORS = ("still", "opposed")
CEILINGS = ("published draw", "symmetric")  # they differ for zero-out alone


class Case(NamedTuple):
    """Who is protected, how many at once, and which kind of pair is asked for."""

    relation: Relation
    size: int
    kind: str


class NonPrivateError(ArithmeticError):
    """ε is infinite."""


def floors(event, relation, group_size):
    """Returns compositions that are reached."""
    return list({reduced(event, relation, group_size, scenario): None for scenario in FLOORS})


def ceilings(event, relation, group_size):
    """Returns compositions each of which dominates whatever the event describes."""
    return list({reduced(event, relation, group_size, kind): None for kind in CEILINGS})


def reduced(event, relation, group_size, kind):
    terms: dict = {}
    squared_mu = _add(event, 1, Case(relation, group_size, kind), terms)
    return Composition(squared_mu, tuple(terms.items()))


def squared_inverse(event):
    """Returns 1/σ² of the one Gaussian that equals the event on a batch, or None: precisions of the shifts add."""
    if isinstance(event, NoEvent):
        return 0.0
    if isinstance(event, GaussianEvent):
        if event.noise_multiplier == 0.0:
            raise NonPrivateError
        return event.noise_multiplier**-2
    if isinstance(event, ClipCountEvent):  # the count's sensitivity is 1/2
        if 0.0 in (event.noise_multiplier, event.count_noise):
            raise NonPrivateError
        return event.noise_multiplier**-2 + (0.5 / event.count_noise) ** 2
    if isinstance(event, SelfComposedEvent):
        inner = 0.0 if event.count == 0 else squared_inverse(event.event)
        return None if inner is None else event.count * inner
    if isinstance(event, ComposedEvent):
        inners = [squared_inverse(each) for each in event.events]
        return None if None in inners else sum(inners)
    return None


def _add(event, count, case, terms):
    """Adds the sampled steps to `terms` and returns the squared shift of what was not sampled."""
    if count == 0 or isinstance(event, NoEvent):
        return 0.0
    if isinstance(event, NonPrivateEvent):
        raise NonPrivateError
    inverse = squared_inverse(event)
    if inverse is not None:
        return count * inverse * (case.size * (2 if case.relation is REPLACE else 1)) ** 2
    if isinstance(event, SelfComposedEvent):
        return _add(event.event, count * event.count, case, terms)
    if isinstance(event, ComposedEvent):
        return sum(_add(each, count, case, terms) for each in event.events)
    if isinstance(event, PartitionEvent):  # every record takes part once a pass
        return _add(event.event, count * event.passes, case, terms)
    inner = squared_inverse(event.event)
    if inner is None:
        return _nested(event, count, case, terms)
    if inner == 0.0:
        return 0.0
    found = _sampled(event, inner**-0.5, case)
    if isinstance(found, float):
        return count * found
    if found is not None and found.parts:
        terms[found] = terms.get(found, 0) + count
    return 0.0


def _nested(event, count, case, terms):
    """Sampling around something sampled.

    Ceiling: given the draw, the two batches are neighbours, and the outer sampling only mixes over draws. A Poisson
    batch has the record or has it not. A batch of fixed size, and one that was cut, has another record in its place,
    so that its neighbours are those of replace-one. Floor: only what is simple is counted, the rest as nothing.
    """
    if _rate(event) == 0.0:
        return 0.0
    if case.kind in CEILINGS:
        in_place = not isinstance(event, PoissonEvent) and case.relation is ADD
        inner_case = case._replace(relation=REPLACE) if in_place else case
        return _add(event.event, count, inner_case, terms)
    inner, times = _within(event.event)
    if inner is not None and times > 0:
        # At least one pass over a partition that puts the whole batch into one part, at least one release of several.
        return _add(_around(event, inner), count, case, terms)
    return 0.0


def _within(event):
    """Returns a Gaussian, or sampled Gaussian, that the event releases at least, and how often; or None."""
    if squared_inverse(event) is not None or (
        isinstance(event, PoissonEvent) and squared_inverse(event.event) is not None
    ):
        return event, 1
    if isinstance(event, PartitionEvent):
        return _within(event.event)[0], event.passes
    if isinstance(event, SelfComposedEvent):
        return _within(event.event)[0], event.count
    if isinstance(event, ComposedEvent):
        found = [each for each in map(_within, event.events) if each[0] is not None and each[1] > 0]
        return found[0] if found else (None, 0)
    return None, 0


def _around(event, inner):
    """Returns the outer sampling around `inner`; Poisson around Poisson is Poisson at the product of the rates."""
    if isinstance(inner, PoissonEvent):
        if isinstance(event, PoissonEvent):
            return PoissonEvent(event.rate * inner.rate, inner.event)
        return NoEvent()
    kept = {name: getattr(event, name) for name in event.__dataclass_fields__ if name != "event"}
    return type(event)(**kept, event=inner)


def _rate(event):
    return event.batch_size / event.dataset_size if isinstance(event, FixedSizeEvent) else event.rate


def mixture(weights_and_shifts, against, sigma):
    """Returns a pair of two dictionaries {shift: weight}."""
    laws = [Law(tuple(law.values()), tuple(map(float, law))) for law in (weights_and_shifts, against)]
    return Pair(*laws, sigma)


def bernoulli(rate, shift, sigma):
    law = Law((1.0 - rate, rate), (0.0, shift)) if rate < 1.0 else Law((1.0,), (shift,))
    return Pair(law, POINT, sigma)


def binomial(size, rate, unit=1.0):
    """Returns {shift: weight} of `unit` times a binomial number."""
    return {unit * i: float(binom.pmf(i, size, rate)) for i in range(size + 1) if binom.pmf(i, size, rate) > 1e-300}


def _sampled(event, sigma, case):
    """Returns the step of one sampled Gaussian, or the squared shift where it is not sampled after all."""
    if _rate(event) == 0.0:
        return None
    if isinstance(event, PoissonEvent):
        return _poisson(event.rate, sigma, case)
    if isinstance(event, FixedSizeEvent):
        return _fixed(event.batch_size, event.dataset_size, sigma, case)
    return _truncated(event, sigma, case)


def _poisson(rate, sigma, case):
    """Others join on their own, so they are a convolution that both laws share: still is the worst, and exact.

    Replace-one: with the same draw one has +1 where the other has -1. A group under replace-one is bounded without
    sampling in the ceiling.
    """
    relation, size, kind = case
    if relation is REPLACE:
        if size > 1 and kind in CEILINGS:
            return (2.0 * size / sigma) ** 2
        if rate == 1.0:
            return (2.0 * size / sigma) ** 2
        return step(mixture(binomial(size, rate), binomial(size, rate, -1.0), sigma))
    if rate == 1.0:
        return (size / sigma) ** 2
    return step(mixture(binomial(size, rate), {0.0: 1.0}, sigma))


def _fixed(batch, total, sigma, case):
    """A batch of fixed size.

    Replace-one. Floors: still, +1 where the other has -1; opposed, a shift of 2 from a constant sum. Ceiling: the
    symmetrised profile at shift 2 (Zhu, Dong and Wang, 2106.08567, proposition 30).

    Zero-out. The draw has the same law on both sides, and the two outputs given the draw are Gaussians at distance at
    most 1 if the record was drawn (probability b/n), equal if not. Publishing the draw only makes the pair worse, so
    "nothing with 1 - b/n, a Gaussian of shift 1 with b/n, and the label seen" dominates; it is never worse than the
    Gaussian without sampling, which it becomes at b = n. The symmetrised profile dominates as well: by advanced joint
    convexity δ at log(1 + q(e^ε - 1)) is at most q times a mean of δ's of Gaussians at distance 2 (another record in
    the place) and 1 (none) in the one order, and at distance 1 in the other; the profile has 2 everywhere. Floors:
    still is the Bernoulli mixture at shift 1. Opposed, without the record the batch sums to -b, with it to -(b-1) + 1
    or -(b-1) + 0: shifts 2 and 1 against 0.

    Add-or-remove-one. With the record in the larger data, another one's place is taken: shift 2. The floor takes the
    smaller rate, b / (n + 1), which is right whichever neighbour `dataset_size` counts, and possible at b = n too.
    """
    relation, size, kind = case
    rate = batch / total
    if kind in CEILINGS:
        if size > 1:
            return ((1.0 if relation is ZERO else 2.0) * size / sigma) ** 2
        if relation is ZERO and (rate == 1.0 or kind == "published draw"):
            return (1.0 / sigma) ** 2 if rate == 1.0 else step(bernoulli(1.0, 1.0, sigma), rate)
        return (2.0 / sigma) ** 2 if rate == 1.0 else step(Symmetric(rate, sigma))
    if size > total or (relation is ADD and kind == "still"):
        return None
    counted = total + size if relation is ADD else total
    drawn = {i: float(hypergeom.pmf(i, counted, size, batch)) for i in range(min(size, batch) + 1)}
    drawn = {i: weight for i, weight in drawn.items() if weight > 0.0}
    if kind == "still":
        against = {-i: weight for i, weight in drawn.items()} if relation is REPLACE else {0: 1.0}
        return step(mixture(drawn, against, sigma))
    against = drawn if relation is ZERO else {0: 1.0}  # the places that the group holds are empty, not filled
    return step(mixture({2 * i: weight for i, weight in drawn.items()}, against, sigma))


def _truncated(event, sigma, case):
    """A Poisson batch that is cut to `cap`, uniformly. K is the number of other records drawn, of n - 1.

    Ceiling, label K < cap seen. K < cap: Poisson's own pair. K >= cap: the record is in the batch with probability
    q E[cap / (K + 1) | K >= cap], in another one's place, as in a batch of fixed size. Groups, and zero-out if that
    costs more: the Gaussian without sampling.
    """
    relation, size, kind = case
    q, cap, total = event.rate, event.cap, event.dataset_size
    others = total - size
    if others < 0:
        return None
    if kind in CEILINGS:
        return _truncated_ceiling((q, cap, others), sigma, case)
    if size > 1 or relation is REPLACE:
        return None
    numbers = range(max(0, int(binom.ppf(1e-17, others, q)) - 1), int(binom.isf(1e-17, others, q)) + 2)
    chances = {k: float(binom.pmf(k, others, q)) for k in numbers if k <= others}
    kept = sum(weight * q * min(1.0, cap / (k + 1)) for k, weight in chances.items())
    if kind == "still":
        return step(bernoulli(min(kept, 1.0), 1.0, sigma))
    # Opposed: without the record the sum is -min(K, cap). Shifted by the cap, so that a full batch is at 0.
    with_record: dict = {}
    without: dict = {}
    for k, weight in chances.items():
        included = q * min(1.0, cap / (k + 1))
        place = float(cap - min(k, cap))
        taken = place + (1.0 if k < cap else 2.0)
        zeroed = place + (0.0 if k < cap else 1.0)
        for law, shift, share in ((with_record, place, 1.0 - included), (with_record, taken, included)):
            law[shift] = law.get(shift, 0.0) + weight * share
        parts = ((place, 1.0 - included), (zeroed if relation is ZERO else place, included))
        for shift, share in parts:
            without[shift] = without.get(shift, 0.0) + weight * share
    laws = [{shift: weight for shift, weight in law.items() if weight > 1e-17} for law in (with_record, without)]
    if max(map(len, laws)) > 60:
        return step(bernoulli(min(kept, 1.0), 1.0, sigma))
    return step(mixture(*laws, sigma))


def _truncated_ceiling(sampler, sigma, case):
    relation, size, kind = case
    q, cap, others = sampler
    if size > 1:
        return ((1.0 if relation is ZERO else 2.0) * size / sigma) ** 2
    full = float(bdtrc(cap - 1, others, q)) if others >= cap else 0.0
    if full <= 0.0:
        return _poisson(q, sigma, case)
    # Σ_{k >= cap} C(m, k) q^(k+1) (1-q)^(m-k) cap / (k + 1) = cap / (m + 1) Pr[Bin(m + 1, q) > cap]
    total = others + 1
    kept = min(1.0, (float(bdtrc(cap, total, q)) if total > cap else 0.0) * cap / (full * total))
    if relation is ZERO and kind == "published draw":
        when_full = bernoulli(1.0, 1.0, sigma), full * kept  # the draw published, as in a batch of fixed size
    elif relation is ADD:
        when_full = bernoulli(kept, 2.0, sigma), full
    else:
        when_full = (Symmetric(kept, sigma) if kept < 1.0 else bernoulli(1.0, 2.0, sigma)), full
    parts = [(when_full[1], when_full[0])] if when_full[1] > 0.0 else []
    if full < 1.0:
        own = _poisson(q, sigma, case)
        if isinstance(own, float):
            own = step(bernoulli(1.0, 2.0 if relation is REPLACE else 1.0, sigma))
        parts.append((1.0 - full, own.parts[0][1]))
    return Step(tuple(parts))
