"""Tiny data sets, every batch enumerated: what δ really is, whatever pair is said to dominate.

A record contributes a number in [-1, 1]; a sampler gives each batch its probability; the output is the batch's sum with
Gaussian noise. Two neighbouring data sets are thus two mixtures of Gaussians, and δ is one integral. No claim may lie
below any of these.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binom, hypergeom

from privet.accounting import (
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    Relation,
    TruncatedPoissonEvent,
    get_delta,
)
from privet.errors import PrivetError

ADD, REPLACE, ZERO = Relation.ADD_OR_REMOVE_ONE, Relation.REPLACE_ONE, Relation.ZERO_OUT
EPSILONS = (0.0, 0.3, 1.0, 2.5)
VALUES = (-1.0, 0.0, 1.0)


def batches(event, records):
    """Returns {batch: probability}; a batch is a tuple of records."""
    found: Counter = Counter()
    places = range(len(records))
    if isinstance(event, PoissonEvent | TruncatedPoissonEvent):
        cap = event.cap if isinstance(event, TruncatedPoissonEvent) else len(records)
        for size in range(len(records) + 1):
            chance = event.rate**size * (1.0 - event.rate) ** (len(records) - size)
            for drawn in itertools.combinations(places, size):
                kept = list(itertools.combinations(drawn, min(size, cap)))
                for each in kept:
                    found[tuple(records[i] for i in each)] += chance / len(kept)
    elif isinstance(event, FixedSizeEvent):
        drawn = list(itertools.combinations(places, min(event.batch_size, len(records))))
        for each in drawn:
            found[tuple(records[i] for i in each)] += 1.0 / len(drawn)
    else:  # a Gaussian, or a partition into one part
        found[tuple(records)] = 1.0
    return found


def sums(event, records):
    """Returns {sum: probability} of what the innermost Gaussian is added to."""
    found: Counter = Counter()
    for batch, chance in batches(event, records).items():
        if isinstance(event, GaussianEvent):
            found[sum(batch)] += chance
        else:
            for total, inner in sums(event.event, batch).items():
                found[total] += chance * inner
    return found


def innermost(event):
    return event if isinstance(event, GaussianEvent) else innermost(event.event)


def delta_of(first, second, sigma, epsilon):
    """Returns ∫ (P - e^ε Q)_+ of two mixtures {shift: weight}, by the trapezoid rule."""
    shifts = [*first, *second]
    x = np.linspace(min(shifts) - 10.0 * sigma, max(shifts) + 10.0 * sigma, 8001)

    def density(law):
        return sum(w * np.exp(-(((x - s) / sigma) ** 2) / 2.0) for s, w in law.items()) / (
            sigma * math.sqrt(2 * math.pi)
        )

    return float(np.maximum(density(first) - math.exp(epsilon) * density(second), 0.0).sum() * (x[1] - x[0]))


def neighbours(relation, size):
    """Yields pairs of data sets of which the larger has `size` records; others take every combination of values."""
    for others in itertools.combinations_with_replacement(VALUES, size - 1):
        for value in VALUES:
            mine = (value, *others)
            if relation is ADD:
                yield mine, others
            elif relation is ZERO:
                yield mine, (0.0, *others)
            else:
                for instead in VALUES:
                    yield mine, (instead, *others)


def worst(event, relation, size, epsilon):
    sigma = innermost(event).noise_multiplier
    return max(
        delta_of(first, second, sigma, epsilon)
        for one, other in neighbours(relation, size)
        for first, second in itertools.permutations((sums(event, one), sums(event, other)))
    )


def claimed_delta(event, relation, epsilon):
    """Returns the δ claimed; 1 where the accountant refuses to answer."""
    try:
        return get_delta(event, epsilon, relation=relation)
    except PrivetError:
        return 1.0


G = GaussianEvent(1.0)
SMALL = GaussianEvent(0.6)
EVENTS = [
    PoissonEvent(0.4, G),
    PoissonEvent(0.9, SMALL),
    FixedSizeEvent(1, 4, G),
    FixedSizeEvent(2, 4, SMALL),
    FixedSizeEvent(3, 4, G),
    TruncatedPoissonEvent(0.5, 2, 4, G),
    TruncatedPoissonEvent(0.9, 1, 4, SMALL),
    TruncatedPoissonEvent(0.9, 3, 4, G),
    PoissonEvent(0.6, PoissonEvent(0.5, SMALL)),
    PoissonEvent(0.6, FixedSizeEvent(1, 2, G)),
    FixedSizeEvent(3, 4, PoissonEvent(0.7, SMALL)),
    FixedSizeEvent(3, 4, PartitionEvent(1, G)),
    FixedSizeEvent(3, 4, FixedSizeEvent(2, 3, G)),
    TruncatedPoissonEvent(0.9, 2, 4, PoissonEvent(0.8, G)),
    TruncatedPoissonEvent(0.9, 2, 4, PartitionEvent(1, SMALL)),
    TruncatedPoissonEvent(0.9, 3, 4, FixedSizeEvent(2, 3, G)),
]


@pytest.mark.parametrize("relation", list(Relation), ids=lambda relation: relation.value)
@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_no_claim_is_below_what_four_records_reach(event, relation):
    for epsilon in EPSILONS:
        reached = worst(event, relation, 4, epsilon)
        assert claimed_delta(event, relation, epsilon) >= reached * (1.0 - 1e-6) - 1e-12, (epsilon, reached)


@pytest.mark.parametrize("batch_size", [4, 3, 2])
def test_fixed_size_with_one_record_more_than_the_event_says(batch_size):
    """`dataset_size` may count either neighbour; where all records are drawn only the smaller one can be meant."""
    event = FixedSizeEvent(batch_size, 4, G)
    larger = 5 if batch_size == 4 else 4
    for epsilon in EPSILONS:
        assert claimed_delta(event, ADD, epsilon) >= worst(event, ADD, larger, epsilon) * (1.0 - 1e-6)


def test_a_poisson_batch_of_a_cut_one_of_fifty():
    """Others at -1, the record at +1. Without it 50 of 99 are kept, with it perhaps in the place of another one."""
    rate, cap, size = 0.99, 50, 100
    event = TruncatedPoissonEvent(rate, cap, size, PoissonEvent(rate, G))
    numbers = {k: float(binom.pmf(k, size - 1, rate)) for k in range(cap, size)}
    kept = sum(weight * rate * cap / (k + 1) for k, weight in numbers.items())
    whole = {-float(j): float(binom.pmf(j, cap, rate)) for j in range(cap + 1)}
    other: Counter = Counter({shift: weight * (1.0 - kept) for shift, weight in whole.items()})
    for j in range(cap):
        weight = kept * float(binom.pmf(j, cap - 1, rate))
        other[-float(j)] += weight * (1.0 - rate)
        other[1.0 - j] += weight * rate
    for epsilon in (1.0, 3.0, 4.365):
        assert claimed_delta(event, ADD, epsilon) >= delta_of(other, whole, 1.0, epsilon) * (1.0 - 1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("relation", list(Relation), ids=lambda relation: relation.value)
def test_groups_under_every_sampler(relation, size):
    """The group at +1 (under replace-one: -1 in the other data), all others at 0: only how many are drawn matters."""
    for event, law in [
        (PoissonEvent(0.3, G), binom(size, 0.3)),
        (FixedSizeEvent(3, 10, G), hypergeom(10, size, 3)),
    ]:
        drawn = {float(i): float(law.pmf(i)) for i in range(size + 1)}
        against = {-i: weight for i, weight in drawn.items()} if relation is REPLACE else {0.0: 1.0}
        for epsilon in EPSILONS:
            claim = get_delta(event, epsilon, relation=relation, group_size=size)
            for first, second in ((drawn, against), (against, drawn)):
                assert claim >= delta_of(first, second, 1.0, epsilon) * (1.0 - 1e-6)


def test_a_batch_of_every_subset_has_probability_one():
    """The enumeration itself: probabilities add up, and each record is drawn as often as it should be."""
    for event in EVENTS:
        found = batches(event, (1.0, 0.0, 0.0, 0.0))
        assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
        share = sum(chance for batch, chance in found.items() if 1.0 in batch)
        if isinstance(event, FixedSizeEvent):
            assert share == pytest.approx(event.batch_size / 4, abs=1e-12)
        elif isinstance(event, PoissonEvent):
            assert share == pytest.approx(event.rate, abs=1e-12)
