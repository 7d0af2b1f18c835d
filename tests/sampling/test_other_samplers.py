"""Truncated Poisson, fixed size and cyclic Poisson: the law of each, its refusals, and its bill at both doors."""

from __future__ import annotations

import math
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    ConfigurationError,
    CyclicPoisson,
    FixedSize,
    Flat,
    Gaussian,
    Mechanism,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    Relation,
    TruncatedPoisson,
)
from privet.accounting import (
    FixedSizeEvent,
    GaussianEvent,
    PartitionEvent,
    PoissonEvent,
    TruncatedPoissonEvent,
    get_epsilon,
)
from privet.noise import Keystream, NoiseKey
from privet.sampling import Sampling, loader_for, privatize_loader
from privet.sampling.draw import chosen_indices
from privet.sampling.share import Share
from tests.sampling.law import LEVEL, refutations

SIZE = 40
DATA = TensorDataset(torch.arange(SIZE), torch.randn(SIZE, 2))
ONE = GaussianEvent(1.0)
SAMPLERS: list[Sampling] = [
    TruncatedPoisson(rate=0.2, cap=9, dataset_size=SIZE),
    FixedSize(batch_size=8, dataset_size=SIZE),
    CyclicPoisson(rate=0.8, parts=4),
]
EVENTS = [
    TruncatedPoissonEvent(0.2, 9, SIZE, ONE),
    FixedSizeEvent(8, SIZE, ONE),
    PartitionEvent(1, PoissonEvent(0.8, ONE)),
]
NAMES = ["truncated", "fixed size", "cyclic"]
each = pytest.mark.parametrize(("sampling", "event"), list(zip(SAMPLERS, EVENTS, strict=True)), ids=NAMES)


def key(seed: int = 0) -> NoiseKey:
    return NoiseKey.from_generator(torch.Generator().manual_seed(seed))


def masks(sampling: Sampling, size: int, batches: int, numbers: range = range(1, 2)) -> np.ndarray:
    """(batches, size) of each pass, one pass after the other."""
    words = Keystream(key(), purpose="sampling")
    found = np.zeros((batches * len(numbers), size), dtype=bool)
    for place, number in enumerate(numbers):
        shared = sampling.shared(words, size=size, number=number)
        for index in range(batches):
            drawn = sampling.draw(words, size=size, number=number, index=index, shared=shared)
            assert len(set(drawn)) == len(drawn)
            found[place * batches + index, drawn] = True
    return found


def fair(mask: np.ndarray) -> bool:
    """Whether every example was in as many batches as any other, but for chance."""
    counts = mask.sum(0)
    chance = counts.mean() / len(mask)
    spread = ((counts - counts.mean()) ** 2).sum() / (len(mask) * chance * (1 - chance))
    degrees = mask.shape[1] - 1
    return bool(2 * min(stats.chi2.sf(spread, degrees), stats.chi2.cdf(spread, degrees)) > LEVEL)


def test_a_batch_of_fixed_size_is_a_uniform_choice():
    words = Keystream(key(), purpose="sampling")
    for count, size in ((2, 6), (4, 6)):
        drawn = [tuple(chosen_indices(words, count=count, size=size, step=step, name="c")) for step in range(1500)]
        kinds, counts = np.unique(np.array(drawn), axis=0, return_counts=True)
        assert len(kinds) == math.comb(size, count)
        assert stats.chisquare(counts).pvalue > LEVEL
        assert all(a < b for one in drawn[:50] for a, b in pairwise(one))
    assert chosen_indices(words, count=5, size=5, step=0, name="c").tolist() == [0, 1, 2, 3, 4]
    # A choice that is not uniform, as the first ones in order would be, is told apart.
    first = np.sort(np.random.default_rng(0).integers(0, 6, (1500, 2)), axis=1)
    assert stats.chisquare(np.unique(first, axis=0, return_counts=True)[1]).pvalue < LEVEL


def test_a_truncated_batch_is_a_poisson_batch_cut_at_random():
    cap, batches = 10, 1500
    mask = masks(TruncatedPoisson(0.2, cap, SIZE), SIZE, batches)
    sizes = mask.sum(1)
    whole = stats.binom.pmf(np.arange(cap), SIZE, 0.2) * batches
    expected = np.append(whole, batches - whole.sum())  # all larger ones have the size of the cap
    kept = expected > 5
    counts = np.bincount(sizes, minlength=cap + 1)
    assert stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue > LEVEL
    assert fair(mask)
    assert fair(mask[sizes == cap])
    # To keep the first ones, in place of a random choice, would favor the first examples.
    poisson = masks(Poisson(0.2), SIZE, batches)
    first = poisson & (np.cumsum(poisson, axis=1) <= cap)
    assert not fair(first)
    assert refutations(masks(TruncatedPoisson(0.2, SIZE, SIZE), SIZE, batches), 0.2) == []


def test_each_part_is_drawn_from_by_coins_and_stays_what_it_is():
    sampling, passes = CyclicPoisson(rate=0.5, parts=4), 400
    mask = masks(sampling, SIZE, 4, range(1, passes + 1)).reshape(passes, 4, SIZE)
    met = mask.any(0)  # (parts, size): where an example was ever met
    assert (met.sum(0) == 1).all()  # in one part, in all passes
    assert len({tuple(row) for row in met.tolist()}) == 4
    for part in range(4):
        assert refutations(mask[:, part][:, met[part]], 0.5) == []
    words = Keystream(key(), purpose="sampling")
    sizes = np.diff(CyclicPoisson(0.5, 4).shared(words, size=8000, number=9).starts)
    assert stats.chisquare(sizes).pvalue > LEVEL
    # Parts that are cut anew in each pass, as of a fresh key, are seen.
    moved = mask.copy()
    moved[::2] = mask[::2][:, [1, 2, 3, 0]]
    assert (moved.any(0).sum(0) > 1).any()


@each
def test_ranks_and_workers_share_one_draw(sampling, event):
    del event
    whole = [b[0].tolist() for b in loader_for(DATA, sampling=sampling, key=key())]
    parts = [[b[0].tolist() for b in loader_for(DATA, sampling=sampling, key=key(), share=Share(r, 2))] for r in (0, 1)]
    assert [sorted(chain(*both)) for both in zip(*parts, strict=True)] == whole


@each
def test_a_reproducible_run_resumes_with_its_very_next_batch(sampling, event):
    del event
    whole = [b[0].tolist() for b in loader_for(DATA, sampling=sampling, key=key())]
    loader = loader_for(DATA, sampling=sampling, key=key())
    running = iter(loader)
    begun = [next(running)[0].tolist() for _ in range(2)]
    resumed = loader_for(DATA, sampling=sampling, key=key())
    resumed.load_state_dict(loader.state_dict())
    assert begun + [b[0].tolist() for b in resumed] == whole


@each
def test_any_other_run_draws_afresh(sampling, event):
    del event
    loader = loader_for(DATA, sampling=sampling)
    running = iter(loader)
    next(running)
    resumed = loader_for(DATA, sampling=sampling)
    resumed.load_state_dict(loader.state_dict())
    left = sampling.steps_per_pass(SIZE) - (1 if sampling.resumable else 0)
    assert len(list(resumed)) == left


def train(model, optimizer, batches) -> None:
    for _, x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def billed(ledger) -> dict:
    found: dict = {}
    for phase in ledger.phases:
        found[phase.event] = found.get(phase.event, 0) + phase.count
    return found


@each
def test_both_doors_bill_what_the_mechanism_says(sampling, event):
    relation = Relation.REPLACE_ONE if isinstance(sampling, FixedSize) else Relation.ZERO_OUT
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp", relation=relation)
    _, _, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(DATA, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sampling=sampling,
    )
    train(model, optimizer, loader)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        train(model, optimizer, parts)
    count = 2 if sampling.billed_per == "pass" else 2 * sampling.steps_per_pass(SIZE)
    assert billed(engine.ledger) == {event: count}
    mechanism = Mechanism(sampling=sampling, clipping=Flat(1.0), noise=Gaussian(1.0), steps=count)
    expected = mechanism.epsilon(1e-5, accountant="rdp", relation=relation)
    assert 0.0 < expected < math.inf
    assert engine.get_epsilon(1e-5) == expected
    other = nn.Linear(2, 1)
    step = PrivateStep(
        other,
        optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
        mechanism=mechanism,
        loss_per_example=lambda net, batch: net(batch[1]).square().sum(1),
        accountant="rdp",
        relation=relation,
    )
    batches = step.batches(DATA)
    for batch in batches:
        step(batch)
    for _ in range(1 if sampling.billed_per == "pass" else 0):
        for batch in batches:
            step(batch)
    assert step.epsilon(1e-5) == expected


def test_the_cap_is_paid_for():
    """Six deviations above the mean cost nothing, three double ε (Chua et al., arXiv 2411.04205)."""

    def epsilon(cap: int) -> float:
        sampling = TruncatedPoisson(rate=0.01, cap=cap, dataset_size=50_000)
        return get_epsilon(sampling.event_for(ONE, 1000), 1e-5, relation=Relation.ZERO_OUT)

    assert TruncatedPoisson.of(500, 50_000).cap == 634
    free = get_epsilon(Poisson(0.01).event_for(ONE, 1000), 1e-5, relation=Relation.ZERO_OUT)
    assert abs(epsilon(634) - free) < 2e-4  # both are rounded up by the grid, by as much
    assert 3.5 < epsilon(566) < 3.9


def test_a_batch_of_fixed_size_costs_more_under_replace_one():
    sampling = FixedSize(batch_size=500, dataset_size=50_000)
    found = get_epsilon(sampling.event_for(ONE, 1000), 1e-5, relation=Relation.REPLACE_ONE)
    assert 14.8 < found < 14.83


def test_a_cyclic_pass_is_one_poisson_step_at_its_rate():
    event = CyclicPoisson(rate=0.1, parts=10).event_for(ONE, 50)
    assert get_epsilon(event, 1e-5) == get_epsilon(Poisson(0.1).event_for(ONE, 50), 1e-5)
    assert get_epsilon(event, 1e-5) > get_epsilon(Poisson(0.01).event_for(ONE, 500), 1e-5)


REFUSED = [
    (lambda: TruncatedPoisson(1.5, 3, 10), "rate"),
    (lambda: TruncatedPoisson(0.5, 0, 10), "cap"),
    (lambda: loader_for(DATA, sampling=TruncatedPoisson(0.2, 9, 50)), "is for 50 examples, and the data set has 40"),
    (lambda: FixedSize(11, 10), "at most dataset_size = 10"),
    (lambda: FixedSize(0, 10), "batch_size"),
    (lambda: FixedSize(2, 10).scaled(2.0), "no rate to schedule"),
    (lambda: loader_for(DATA, sampling=FixedSize(8, 41)), "is for 41 examples, and the data set has 40"),
    (
        lambda: privatize_loader(DataLoader(DATA, batch_size=8), sampling=FixedSize(8, SIZE), dataset_size=SIZE),
        "batches of fixed size",
    ),
    (lambda: CyclicPoisson(0.5, 0), "parts"),
    (lambda: CyclicPoisson(0.5, 2**32 + 1), r"2\*\*32"),
    (lambda: CyclicPoisson(0.5, 2).scaled(2.0), "not scheduled"),
    (lambda: loader_for(DATA, sampling=CyclicPoisson(0.5, 2), steps=3), "Leave steps="),
]


@pytest.mark.parametrize(("build", "message"), REFUSED)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_a_schedule_may_change_the_rate_below_the_cap():
    sampling = TruncatedPoisson(0.2, 9, SIZE)
    assert sampling.scaled(0.5) == TruncatedPoisson(0.1, 9, SIZE)
    loader = loader_for(DATA, sampling=sampling)
    loader.resample(sampling.scaled(0.5))
    assert loader.expected_batch_size == pytest.approx(4.0)
