"""Random allocation: the law of its batches, passes, ranks and resumes, and its bill at both doors."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Partition,
    PrivacyEngine,
    PrivateStep,
    RandomAllocation,
)
from privet.accounting import GaussianEvent, PartitionEvent, RandomAllocationEvent
from privet.noise import Keystream, NoiseKey
from privet.sampling import loader_for, privatize_loader
from privet.sampling.base import refuse_change
from privet.sampling.draw import random_places
from privet.sampling.share import Share
from tests.sampling.law import LEVEL

SIZE, STEPS = 40, 5
DATA = TensorDataset(torch.arange(SIZE), torch.randn(SIZE, 2))
PASS = RandomAllocationEvent(STEPS, GaussianEvent(1.0))


def key(seed: int = 0) -> NoiseKey:
    return NoiseKey.from_generator(torch.Generator().manual_seed(seed))


def places(passes: int, size: int, steps: int, seed: int = 0) -> np.ndarray:  # (passes, size): the step of each
    words = Keystream(key(seed), purpose="sampling")
    sampling = RandomAllocation(steps)
    found = np.full((passes, size), -1)
    for number in range(1, passes + 1):
        shared = sampling.shared(words, size=size, number=number)
        for index in range(steps):
            drawn = sampling.draw(words, size=size, number=number, index=index, shared=shared)
            found[number - 1, drawn] = index
    return found


def refuted(found: np.ndarray, steps: int) -> list[str]:
    """What refutes that every example is in one step of each pass, uniformly and independently of all others."""
    passes, size = found.shape
    wrong = []
    counts = np.stack([(found == index).sum(0) for index in range(steps)])  # (steps, size)
    # Pearson's statistic of each example, added up: its law is not far from a normal one.
    pearson = ((counts - passes / steps) ** 2 / (passes / steps)).sum()
    degrees = size * (steps - 1)
    if 2 * min(stats.chi2.sf(pearson, degrees), stats.chi2.cdf(pearson, degrees)) < LEVEL:
        wrong.append("step of each example")
    sizes = np.stack([(found == index).sum(1) for index in range(steps)])
    dispersion = ((sizes - size / steps) ** 2 / (size / steps)).sum()
    degrees = passes * (steps - 1)
    if 2 * min(stats.chi2.sf(dispersion, degrees), stats.chi2.cdf(dispersion, degrees)) < LEVEL:
        wrong.append("sizes of batches")
    for name, agree in (("two examples", found[:, 1:] == found[:, :-1]), ("two passes", found[1:] == found[:-1])):
        if stats.binomtest(int(agree.sum()), agree.size, 1 / steps).pvalue < LEVEL:
            wrong.append(name)
    return wrong


def test_every_example_is_in_one_step_of_each_pass_at_random():
    for steps in (2, 5, 7):
        found = places(600, 30, steps)
        assert (found >= 0).all()
        assert refuted(found, steps) == []


def test_wrong_laws_are_refuted():
    found = places(600, 30, 5)
    rng = np.random.default_rng(0)
    shuffled = np.argsort(rng.random(found.shape), axis=1) % 5  # equal sizes, as a shuffled loader has
    assert "sizes of batches" in refuted(shuffled, 5)
    uneven = np.where((found == 4) & (rng.random(found.shape) < 0.3), 3, found)
    assert "step of each example" in refuted(uneven, 5)
    together = found.copy()
    together[:, 1::2] = together[:, ::2]
    assert "two examples" in refuted(together, 5)
    assert "two passes" in refuted(np.repeat(found[:300], 2, axis=0), 5)  # one allocation for two passes


@pytest.mark.parametrize("count", [1, 3, 2**20 + 7])
def test_a_place_is_the_interval_of_its_word(count):
    words = Keystream(key(), purpose="sampling")
    found = random_places(words, places=count, size=50, step=3, name="p")
    expected = [int(word) * count >> 64 for word in words.words(50, step=3, name="p")]
    place = np.searchsorted(found.starts, np.arange(50), side="right") - 1
    by_example = np.empty(50, dtype=np.int64)
    by_example[found.examples] = place
    assert by_example.tolist() == expected


def test_a_pass_of_the_loader_holds_every_example_once():
    loader = loader_for(DATA, sampling=RandomAllocation(STEPS))
    first = [batch[0].tolist() for batch in loader]
    second = [batch[0].tolist() for batch in loader]
    assert len(first) == STEPS
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(SIZE))
    assert first != second
    assert loader.expected_batch_size == SIZE / STEPS


def test_an_example_twice_in_a_pass_is_seen_by_the_test_above():
    class Twice(RandomAllocation):
        def draw(self, words, *, size, number, index, shared):
            return super().draw(words, size=size, number=number, index=max(index, 1), shared=shared)

    loader = loader_for(DATA, sampling=Twice(STEPS))
    assert sorted(chain(*(batch[0].tolist() for batch in loader))) != list(range(SIZE))


def test_ranks_share_one_draw():
    shares = [
        loader_for(DATA, sampling=RandomAllocation(STEPS), key=key(), share=Share(rank=rank, ranks=3))
        for rank in range(3)
    ]
    whole = [batch[0].tolist() for batch in loader_for(DATA, sampling=RandomAllocation(STEPS), key=key())]
    parts = [[batch[0].tolist() for batch in share] for share in shares]
    for index, examples in enumerate(whole):
        assert sorted(chain(*(part[index] for part in parts))) == examples


def test_workers_change_nothing():
    alone = [b[0].tolist() for b in loader_for(DATA, sampling=RandomAllocation(STEPS), key=key())]
    helped = [b[0].tolist() for b in loader_for(DATA, sampling=RandomAllocation(STEPS), key=key(), num_workers=1)]
    assert alone == helped


def test_a_resumed_pass_of_a_reproducible_run_goes_on():
    whole = [b[0].tolist() for b in loader_for(DATA, sampling=RandomAllocation(STEPS), key=key())]
    loader = loader_for(DATA, sampling=RandomAllocation(STEPS), key=key())
    running = iter(loader)
    begun = [next(running)[0].tolist() for _ in range(2)]
    resumed = loader_for(DATA, sampling=RandomAllocation(STEPS), key=key())
    resumed.load_state_dict(copy.deepcopy(loader.state_dict()))
    assert begun + [b[0].tolist() for b in resumed] == whole


def test_any_other_run_resumes_with_a_new_pass():
    loader = loader_for(DATA, sampling=RandomAllocation(STEPS))
    running = iter(loader)
    next(running)
    resumed = loader_for(DATA, sampling=RandomAllocation(STEPS))
    resumed.load_state_dict(loader.state_dict())
    assert sorted(chain(*(b[0].tolist() for b in resumed))) == list(range(SIZE))
    other = loader_for(DATA, sampling=RandomAllocation(STEPS + 1))
    with pytest.raises(ConfigurationError, match="sampling"):
        other.load_state_dict(loader.state_dict())


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigurationError, match="steps"):
        RandomAllocation(0)
    with pytest.raises(ConfigurationError, match="steps"):
        RandomAllocation(2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"2\*\*32"):
        RandomAllocation(2**32 + 1)
    with pytest.raises(ConfigurationError, match="rate"):
        RandomAllocation(5).scaled(2.0)
    with pytest.raises(ConfigurationError, match="Expected Poisson"):
        refuse_change(RandomAllocation(5), RandomAllocation(10))
    with pytest.raises(ConfigurationError, match="Leave steps="):
        loader_for(DATA, sampling=RandomAllocation(5), steps=3)
    with pytest.raises(ConfigurationError, match="Change one of the two"):
        privatize_loader(DataLoader(DATA, batch_size=4), sampling=RandomAllocation(STEPS))
    with pytest.raises(ConfigurationError, match="more than the 4 examples"):
        RandomAllocation.of(5, 4)
    assert RandomAllocation.of(8, SIZE) == RandomAllocation(STEPS)


def paper(**options):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    data = DataLoader(DATA, batch_size=SIZE // STEPS)
    options.setdefault("noise_multiplier", 1.0)
    make = engine.make_private_with_epsilon if "target_epsilon" in options else engine.make_private
    _, _, loader = make(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        max_grad_norm=1.0,
        sampling=RandomAllocation(STEPS),
        **{k: v for k, v in options.items() if not ("target_epsilon" in options and k == "noise_multiplier")},
    )
    return engine, model, optimizer, loader


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


def test_the_papers_door_bills_each_pass_that_is_begun():
    engine, model, optimizer, loader = paper()
    train(model, optimizer, loader)
    assert billed(engine.ledger) == {PASS: 1}
    running = iter(loader)
    train(model, optimizer, [next(running)])
    train(model, optimizer, loader)  # the pass was left, and another one is begun
    assert billed(engine.ledger) == {PASS: 3}
    planned = Mechanism(sampling=RandomAllocation(STEPS), clipping=Flat(1.0), noise=Gaussian(1.0), steps=3)
    assert engine.get_epsilon(1e-5) == planned.epsilon(1e-5, accountant="rdp")


def test_a_pass_that_was_set_back_is_billed_again():
    engine, model, optimizer, loader = paper()
    running = iter(loader)
    train(model, optimizer, [next(running)])
    loader.load_state_dict(loader.state_dict())
    train(model, optimizer, loader)
    assert billed(engine.ledger) == {PASS: 2}


def test_virtual_steps_bill_what_logical_ones_do():
    engine, model, optimizer, loader = paper()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        train(model, optimizer, parts)
    assert billed(engine.ledger) == {PASS: 1}


def test_noise_that_changes_within_a_pass_makes_its_rest_unamplified():
    engine, model, optimizer, loader = paper()
    running = iter(loader)
    train(model, optimizer, [next(running)])
    update = engine._watched[0].update  # what a schedule of the noise does
    update.mechanism = replace(update.mechanism, noise=Gaussian(2.0))
    train(model, optimizer, running)
    assert billed(engine.ledger) == {PASS: 1, PartitionEvent(1, GaussianEvent(2.0)): 1}
    train(model, optimizer, loader)
    assert billed(engine.ledger)[RandomAllocationEvent(STEPS, GaussianEvent(2.0))] == 1


def test_a_target_is_met_by_passes():
    engine, model, optimizer, loader = paper(target_epsilon=3.0, target_delta=1e-5, epochs=2)
    for _ in range(2):
        train(model, optimizer, loader)
    assert 2.9 < engine.get_epsilon(1e-5) <= 3.0


def test_the_explicit_door_trains_and_bills():
    model = nn.Linear(2, 1)
    mechanism = Mechanism(sampling=RandomAllocation(STEPS), clipping=Flat(1.0), noise=Gaussian(1.0), steps=2)
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=mechanism,
        loss_per_example=lambda net, batch: net(batch[1]).square().sum(1),
        accountant="rdp",
    )
    loader = step.batches(DATA)
    for _ in range(2):
        for batch in loader:
            step(batch)
    assert billed(step.ledger) == {PASS: 2}
    assert step.epsilon(1e-5) == mechanism.epsilon(1e-5, accountant="rdp")


def test_a_declared_size_may_stand_for_the_length():
    loader = privatize_loader(DataLoader(DATA, batch_size=8), sampling=RandomAllocation(STEPS), dataset_size=41)
    assert loader.expected_batch_size == 41 / STEPS
    with pytest.raises(ConfigurationError, match="dataset_size="):
        privatize_loader(DataLoader(DATA, batch_size=8), sampling=Partition(batch_size=8), dataset_size=41)
