"""What ranks refuse: unlike settings, an unlike order, wrappers of another kind, and failures of one of them."""

from __future__ import annotations

import os
import re
import signal
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from privet import FileLedger, PrivacyEngine
from privet.accounting import NonPrivateEvent
from privet.errors import ConfigurationError, RanksError
from tests.parallel.models import data, engine_on, mechanism, net, step_on, weights
from tests.parallel.ranks import run, start


def raised(action):
    """Returns the class and the message of what an action raises, or None."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return type(error), str(error)
    return None


def loop(model, optimizer, loader):
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def late_wrap():
    _, model, optimizer, loader = engine_on(net())
    loop(DistributedDataParallel(model), optimizer, loader)


def fails_in_loss(rank):
    """The loss of rank 1 raises at its third step. Returns what each rank raised, its bill, and what went on."""
    begun = 0

    def loss(model, batch):
        if rank == 1 and begun == 3:
            raise ValueError("a bad record")
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = net()
    step = step_on(model)
    step._loss._loss = loss
    batches = iter(step.batches(data()))

    def until_failure():
        nonlocal begun
        for batch in batches:
            begun += 1
            step(batch)

    first = raised(until_failure)
    before, steps, begun = weights(model), step.ledger.steps, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the batch that failed is billed as one that was left out
        for batch in batches:  # every rank knows of the failure, so that all may go on
            step(batch)
    return first, steps, step.ledger.steps, bool((weights(model) - before).norm() > 0)


def leaves_out_alone(rank):
    """Rank 1 leaves a batch out that rank 0 trains on."""
    engine, model, optimizer, loader = engine_on(net())
    kept = (batch for i, batch in enumerate(loader) if rank == 0 or i != 1)
    return raised(lambda: loop(model, optimizer, kept)), engine.ledger.steps


def schedules_alone(rank):
    step = step_on(net())
    batches = iter(step.batches(data()))
    step(next(batches))
    if rank == 1:
        step._update.mechanism = mechanism(sigma=0.5)
    return raised(lambda: step(next(batches)))


def shards_of_its_own(rank):
    loader = DataLoader(data(), batch_size=12, sampler=DistributedSampler(data()))
    model = net()
    return raised(
        lambda: PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    )


def half_frozen(rank):
    model = net()
    (model.norm if rank else model.head).requires_grad_(False)
    return model


def broken_on_one(rank):
    model = net()
    if rank == 1:
        model.extra = nn.BatchNorm1d(3)
    return model


def draws_otherwise(rank):
    """A machine whose library draws another batch from the same key."""
    step = step_on(net())
    loader = step.batches(data())
    if rank == 1:
        examples = loader._batches.examples
        loader._batches.examples = lambda number, index: [(i + 1) % 60 for i in examples(number, index)]
    return raised(lambda: [step(batch) for batch in loader])


def begun_alone(rank):
    step = step_on(net())
    batches = iter(step.batches(data()))
    step(next(batches))
    if rank == 1:
        step.ledger.begin(NonPrivateEvent())
    return raised(lambda: step(next(batches))), step.epsilon(1e-5)


def scenario(rank, world, folder):
    found = {
        "model": raised(lambda: engine_on(net(width=6 + rank))),
        "frozen": raised(lambda: engine_on(half_frozen(rank))),
        "sigma": raised(lambda: engine_on(net(), sigma=1.0 + rank)),
        "clip": raised(lambda: engine_on(net(), clip=0.7 + rank)),
        "data": raised(lambda: engine_on(net(), n=60 + rank)),
        "batch size": raised(lambda: engine_on(net(), batch_size=12 + rank)),
        "workers": raised(lambda: engine_on(net(), workers=rank)),
        "generator": raised(lambda: engine_on(net(), seed=rank)),
        "one secret": raised(lambda: engine_on(net(), seed=7 if rank else None)),
        "learning rate": raised(lambda: step_on(m := net(), optimizer=torch.optim.SGD(m.parameters(), lr=0.1 + rank))),
        "relation": raised(lambda: step_on(net(), relation="replace_one" if rank else None)),
        "explicit sigma": raised(lambda: step_on(net(), what=mechanism(sigma=1.0 + rank))),
        "explicit data": raised(lambda: step_on(net()).batches(data(60 + rank))),
        "batch norm on one": raised(lambda: engine_on(broken_on_one(rank))),
        "late wrap": raised(late_wrap),
        "static graph": raised(lambda: engine_on(DistributedDataParallel(net(), static_graph=True))),
        "inside": raised(lambda: engine_on(nn.Sequential(DistributedDataParallel(net())))),
        "DataParallel": raised(lambda: engine_on(DataParallel(net()))),
        "DistributedSampler": shards_of_its_own(rank),
        "loss": fails_in_loss(rank),
        "left out alone": leaves_out_alone(rank),
        "scheduled alone": schedules_alone(rank),
        "begun alone": begun_alone(rank),
        "drawn otherwise": draws_otherwise(rank),
    }
    engine_on(net())  # and after all of this the ranks still meet
    return found


@pytest.fixture(scope="module")
def ranks():
    return run(scenario)


UNLIKE = {
    "model": ("parameters", r"\(6, 5\).* on rank 0, .*\(7, 5\).* on rank 1"),
    "frozen": ("parameters", "on rank 0, .*on rank 1"),
    "sigma": ("mechanism", r"multiplier=1.0.*on rank 0.*multiplier=2.0.*on rank 1"),
    "clip": ("mechanism", "0.7.*on rank 0.*1.7.*on rank 1"),
    "data": ("loader", "'size': 60.*on rank 0.*'size': 61.*on rank 1"),
    "batch size": ("expected batch size", "12 on rank 0, 13 on rank 1"),
    "workers": ("loader", "'num_workers': 0.*'num_workers': 1"),
    "generator": ("noise_generator", "on rank 0, .* on rank 1"),
    "one secret": ("noise_generator", "none on rank 0"),
    "learning rate": ("optimizer", "0.1.*on rank 0.*1.1.*on rank 1"),
    "relation": ("ledger", "zero_out, one example on rank 0, replace_one, one example on rank 1"),
    "explicit sigma": ("mechanism", "on rank 0, .*on rank 1"),
    "explicit data": ("loader", "on rank 0, .*on rank 1"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_ranks_that_were_not_given_the_same_are_refused_on_all_of_them_and_named(ranks, what):
    name, ranks_named = UNLIKE[what]
    for kind, message in (found[what] for found in ranks):
        assert kind is RanksError
        assert "were not given the same" in message
        assert re.search(rf"{name}: .*{ranks_named}", message), message


def test_an_error_at_the_start_on_one_rank_is_an_error_on_all(ranks):
    assert "extra" in ranks[1]["batch norm on one"][1]
    kind, message = ranks[0]["batch norm on one"]
    assert kind is RanksError
    assert "rank 1 failed" in message
    assert "UnsupportedModelError" in message


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("late wrap", "Expected the wrapper first. The order is: init_process_group"),
        ("static graph", "static_graph=True"),
        ("inside", "0 is a DistributedDataParallel inside of the module"),
        ("DataParallel", "is a DataParallel"),
        ("DistributedSampler", "DistributedSampler"),
    ],
)
def test_another_wrapping_is_a_clear_error(ranks, what, words):
    for kind, message in (found[what] for found in ranks):
        assert kind in (ConfigurationError, RanksError)
        assert words in message


def test_an_error_in_the_loss_of_one_rank_ends_the_step_of_all_and_nothing_of_it_is_billed(ranks):
    (kind, message), steps, in_all, moved = ranks[1]["loss"]
    assert (kind, message) == (ValueError, "a bad record")
    (other, told), *same = ranks[0]["loss"]
    assert other is RanksError
    assert "rank 1 failed" in told
    assert "ValueError: a bad record" in told
    assert same == [steps, in_all, moved]
    assert moved
    assert (steps, in_all) == (2, 10)


def test_a_batch_that_one_rank_alone_leaves_out_is_refused_before_it_is_billed(ranks):
    for (kind, message), steps in (found["left out alone"] for found in ranks):
        assert kind is RanksError
        assert "(1, 1) on rank 0, (1, 2) on rank 1" in message
        assert steps == 1


def test_a_mechanism_that_changes_on_one_rank_alone_is_refused(ranks):
    for kind, message in (found["scheduled alone"] for found in ranks):
        assert kind is RanksError
        assert "ranks are about to release different steps" in message


def test_what_one_rank_alone_has_begun_ends_the_training_of_all(ranks):
    (kind, message), epsilon = ranks[1]["begun alone"]
    assert kind is RanksError
    assert "this rank alone has begun NonPrivateEvent()" in message
    assert epsilon == float("inf")
    (kind, message), _ = ranks[0]["begun alone"]
    assert kind is RanksError
    assert "rank 1 failed" in message


def late_group(rank, world, folder):
    step = step_on(net())
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=world)
    return raised(lambda: step((torch.ones(2, 5), torch.tensor([0, 1]))))


def test_a_group_that_is_initialized_after_training_became_private_is_refused():
    for kind, message in run(late_group, initialize=False):
        assert kind is ConfigurationError
        assert "initialized after its training became private" in message


def test_ranks_that_draw_unlike_batches_from_one_key_are_refused(ranks):
    for kind, message in (found["drawn otherwise"] for found in ranks):
        assert kind is RanksError
        assert "drew different batches from one key" in message


# -- no group, and ranks that are gone ---------------------------------------------------------------------------------


def test_processes_of_a_launcher_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for make in (engine_on, step_on):
        with pytest.raises(ConfigurationError, match=r"one of 2 processes .* no process group is initialized"):
            make(net())
    monkeypatch.setenv("WORLD_SIZE", "1")
    engine_on(net())


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "FSDPModule", "DataParallel"])
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("make", [engine_on, step_on])
def test_a_wrapper_that_is_not_supported_is_refused_by_its_name(make, where, name):
    module = DataParallel(net()) if name == "DataParallel" else type(name, (nn.Linear,), {})(5, 3)
    with pytest.raises(ConfigurationError, match=f"is a {name}" if name != "FSDPModule" else "is sharded"):
        make(nn.Sequential(module) if where == "inside" else module)


def dies(rank, world, folder, where):
    """Rank 1 ends in its third step, by a signal or by leaving the loop; returns what the others raise."""
    model = net()
    # Every rank is given the file, as one program for all ranks would do. Rank 0 alone writes to it.
    ledger = FileLedger(folder / "ledger", relation="zero_out")
    step = step_on(model, ledger=ledger, seed=None)
    released = 0
    inner = step._update.noise._inner

    def release(*args, **kwargs):
        if rank == 1 and released == 2 and where == "after the bill":
            os.kill(os.getpid(), signal.SIGKILL)
        return type(inner).release(inner, *args, **kwargs)

    step._update.noise._inner = type("Dying", (), {"release": staticmethod(release)})()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for batch in step.batches(data()):
                if rank == 1 and released == 2 and where == "in its forward":
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank == 1 and released == 2 and where == "early":
                    return None
                step(batch)
                released += 1
        except RanksError as error:
            again = raised(lambda: step(batch))
            return str(error), again, released, FileLedger(folder / "ledger", relation="zero_out").steps
    return None


@pytest.mark.parametrize("where", ["in its forward", "after the bill", "early"])
def test_a_rank_that_is_gone_ends_the_others_with_an_error_and_the_ledger_has_what_was_released(where):
    found = start(dies, where, timeout=20.0)
    assert not any(found.failed), found.failed
    message, (kind, again), released, on_disk = found.results[0]
    assert "lost the other" in message
    assert kind is RanksError
    assert "lost the other" in again
    assert released == 2
    assert on_disk == (3 if where == "after the bill" else 2)
