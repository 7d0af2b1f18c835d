"""Replicated training at the paper's door: modes, virtual steps, schedules, budgets, and what is billed."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from privet import BatchMemoryManager, BudgetExceededError, Exponential, PrivacyEngine, Schedule
from privet.accounting import Budget
from privet.errors import RanksError
from tests.parallel.models import digest, engine_on, net, weights
from tests.parallel.ranks import run


def loop(model, optimizer, loader, *, schedule=None):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if schedule:
            schedule.step()


def said(engine, model):
    return weights(model), engine.get_epsilon(1e-5), engine.ledger.steps, engine.ledger.marks


def passes(model, *, mode="auto", wrap=False, **options):
    model = DistributedDataParallel(model) if wrap else model
    engine, found, optimizer, loader = engine_on(model, grad_sample_mode=mode, **options)
    assert found is model
    loop(model, optimizer, loader)
    return said(engine, model)


def small_parts(model):
    engine, model, optimizer, loader = engine_on(model)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        loop(model, optimizer, parts)
    return said(engine, model)


def scheduled(model):
    engine, model, optimizer, loader = engine_on(model)
    schedule = Schedule(optimizer, noise=Exponential(0.9), rate=Exponential(0.8))
    loop(model, optimizer, loader, schedule=schedule)
    return said(engine, model)


def accumulated(model):
    engine, model, optimizer, loader = engine_on(model, batch_size=2, accumulate=3)
    for i, (x, y) in enumerate(loader):
        (F.cross_entropy(model(x), y) / 3).backward()
        if (i + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return said(engine, model)


def partition(model):
    return passes(model, poisson_sampling=False)


def rare(model):
    """Most shares are empty, and some batches are."""
    return passes(model, batch_size=1)


def two_modules(model):
    """Two networks of one engine, such as those of a GAN, have one bill."""
    engine, model, optimizer, loader = engine_on(model)
    _, other, its_optimizer, its_loader = engine_on(net(seed=3), engine=engine)
    loop(model, optimizer, loader)
    loop(other, its_optimizer, itertools.islice(its_loader, 2))
    return said(engine, model)


def frozen(model):
    model.norm.requires_grad_(False)
    return passes(model, clipping="per_layer")


WAYS = {
    "plain": passes,
    "ddp": lambda model: passes(model, wrap=True),
    "hooks": lambda model: passes(model, mode="hooks", wrap=True),
    "functorch": lambda model: passes(model, mode="functorch"),
    "virtual steps": small_parts,
    "accumulated": accumulated,
    "adaptive": lambda model: passes(model, clipping="adaptive"),
    "schedules": scheduled,
    "partition": partition,
    "rare": rare,
    "frozen, per layer": frozen,
    "two modules": two_modules,
    "psac": lambda model: passes(model, clipping="psac"),
    "workers": lambda model: passes(model, workers=1),
}


def over_budget():
    """Returns what the step that would exceed the budget raises, and what stays of it."""
    engine = PrivacyEngine(budget=Budget(epsilon=3.0, delta=1e-5))
    model = net()
    engine, model, optimizer, loader = engine_on(model, engine=engine)
    for_ever = itertools.chain.from_iterable(itertools.repeat(loader))
    with pytest.raises(BudgetExceededError) as caught:
        loop(model, optimizer, for_ever)
    return (*said(engine, model), str(caught.value))


def foreign(own_batch):
    """Takes one step, on a batch that the loader did not hand over where `own_batch` says so."""
    engine, model, optimizer, loader = engine_on(net())
    batches = iter(loader)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        x, y = (torch.ones(4, 5), torch.tensor([0, 1, 2, 0])) if own_batch else next(batches)
        F.cross_entropy(model(x), y).backward()
        try:
            optimizer.step()
        except RanksError as error:
            return [str(phase.event) for phase in engine.ledger.phases], [str(error)]
    return [str(phase.event) for phase in engine.ledger.phases], [str(each.message) for each in heard]


def left_out():
    """A batch that all ranks leave out in the middle of a pass is billed, as in one process."""
    engine, model, optimizer, loader = engine_on(net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop(model, optimizer, (batch for i, batch in enumerate(loader) if i != 1))
    return engine.ledger.steps, engine.ledger.marks


def secret():
    """A run as users have it, with a key of the operating system: returns its weights, and whether a rerun differs."""
    found = []
    for _ in range(2):
        model = net()
        _, model, optimizer, loader = engine_on(model, seed=None)
        loop(model, optimizer, loader)
        found.append(weights(model))
    return found


def scenario(rank, world, folder):
    found = {name: way(net(seed=rank)) for name, way in WAYS.items()}  # rank 0's weights are everybody's
    found["over budget"] = over_budget()
    found["foreign"], found["foreign on one"] = foreign(own_batch=True), foreign(own_batch=rank == 1)
    found["left out"] = left_out()
    found["secret"] = secret()
    engine, *_ = engine_on(net())
    return {**found, "repr": repr(engine)}


@pytest.fixture(scope="module")
def ranks():
    return run(scenario)


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_goes_where_that_of_one_process_goes(ranks, way):
    model = net()
    if way == "ddp":
        there, epsilon, steps, marks = passes(model)
    elif way == "hooks":
        there, epsilon, steps, marks = passes(model, mode="hooks")
    else:
        there, epsilon, steps, marks = WAYS[way](model)
    moved = (there - weights(net())).norm()
    for found in ranks:
        assert (found[way][0] - there).norm() < 2e-6 * moved
        assert found[way][1:] == (epsilon, steps, marks)
    assert digest(ranks[0][way][0]) == digest(ranks[1][way][0])


def test_a_budget_ends_all_ranks_at_the_same_step_and_before_it(ranks):
    alone = over_budget()
    for rank, found in enumerate(ranks):
        there, epsilon, *spent, message = found["over budget"]
        assert spent == list(alone[2:4])
        # Grids that an accountant keeps from earlier questions move its bound by a little.
        assert epsilon == pytest.approx(alone[1], rel=1e-3)
        assert epsilon <= 3.0
        assert (there - alone[0]).norm() < 1e-5 * (alone[0] - weights(net())).norm()
        assert message == alone[4] if rank == 0 else "rank 0 refused the step" in message


def test_a_step_of_all_ranks_on_batches_of_their_own_is_billed_as_an_unsampled_one(ranks):
    assert [found["foreign"][0] for found in ranks] == [["GaussianEvent(noise_multiplier=1.0)"]] * 2
    assert any("did not come, whole and fresh, from the private loader" in each for each in ranks[0]["foreign"][1])


def test_a_batch_of_one_ranks_own_beside_the_shares_of_others_is_refused_since_an_example_may_be_in_both(ranks):
    for events, (message,) in (found["foreign on one"] for found in ranks):
        assert events == []
        assert message.startswith("rank 1 trained on a batch that did not come, whole and fresh")


def test_a_batch_that_all_leave_out_is_billed(ranks):
    assert ranks[0]["left out"] == ranks[1]["left out"] == left_out()


def test_a_run_with_a_secret_key_has_the_same_bits_on_all_ranks_and_never_the_same_twice(ranks):
    for one, other in itertools.pairwise(found["secret"] for found in ranks):
        assert [digest(each) for each in one] == [digest(each) for each in other]
    once, again = ranks[0]["secret"]
    assert (once - again).norm() > 1e-2


def test_what_was_found_is_said(ranks):
    assert all("ranks: 2 ranks, a plain module on each, gloo" in found["repr"] for found in ranks)
