"""Streams: each record in one step of a pass, billed by the pass, and refused where that does not hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from privet import (
    BLT,
    BandMF,
    BatchMemoryManager,
    ConfigurationError,
    Flat,
    Gaussian,
    LambdaCGD,
    Mechanism,
    Partition,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    Stream,
)
from privet.accounting import CorrelatedEvent, GaussianEvent, PartitionEvent, get_epsilon
from privet.sampling import ShardedDataset, ShardedStream, loader_for, privatize_loader
from privet.sampling.share import Share

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")

N, B, S = 10, 4, 3


def records(count=N):
    return [torch.tensor([float(i), 1.0]) for i in range(count)]


class Records(IterableDataset):
    """Records in order, a fresh iterator each time."""

    def __init__(self, count=N, *, dealt=False):
        self.count, self.dealt, self.opened = count, dealt, 0

    def __iter__(self):
        self.opened += 1
        worker = get_worker_info()
        kept = slice(worker.id, None, worker.num_workers) if self.dealt and worker else slice(None)
        return iter(records(self.count)[kept])


class Repeated(Records):
    """The bug of an iterable data set that every worker reads: a record comes twice in a pass."""

    def __iter__(self):
        return itertools.chain.from_iterable((r, r) for r in records(self.count))


def step_of(sampling, *, noise=None, steps=1, seed=None, performance=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1).double()
    return PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=sampling, clipping=Flat(1.0), noise=noise or Gaussian(1.0), steps=steps),
        loss_per_example=lambda model, batch: model(batch.double()).square().sum(1),
        noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        **({} if performance is None else {"performance": performance}),
    )


def at_the_papers_door(sampling, loader, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        sampling=sampling,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **options,
    )
    return engine, *made


def taken(loader):
    return [batch[:, 0].int().tolist() for batch in loader]


IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_each_record_is_in_one_batch_of_each_pass(workers):
    loader = loader_for(Records(), sampling=Stream(B, N, passes=2), num_workers=workers)
    assert [taken(loader), taken(loader)] == [IN_ORDER, IN_ORDER]
    with pytest.raises(ProtocolError, match="pass 3 over a stream would begin"):  # without any door, too
        next(iter(loader))


def test_a_generator_is_read_once_though_its_first_record_was_looked_at():
    loader = loader_for((r for r in records()), sampling=Stream(B, N, passes=2))
    loader.structures()
    assert taken(loader) == IN_ORDER
    with pytest.raises(ProtocolError, match="ended after 0 records, and 10 are declared"):
        taken(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_in_one_order_by_any_number_of_workers(workers):
    sizes, starts = [5, 1, 4], [0, 5, 6]
    data = ShardedStream(sizes, lambda s: iter(records()[starts[s] : starts[s] + sizes[s]]))
    loader = loader_for(data, sampling=Stream(B, N, passes=2), num_workers=workers)
    assert [taken(loader), taken(loader)] == [[[0, 5, 6, 1], [7, 2, 8, 3], [9, 4]]] * 2


def test_each_rank_reads_its_own_shards_and_all_records_once():
    sizes = [7, 2, 5, 5, 1, 9]
    opened = []

    def shard(s):
        opened.append(s)
        return iter([torch.tensor([100.0 * s + i, 1.0]) for i in range(sizes[s])])

    found = []
    for rank in range(3):
        opened.clear()
        loader = loader_for(
            ShardedStream(sizes, shard), sampling=Stream(8, sum(sizes)), share=Share(rank=rank, ranks=3)
        )
        found.append(taken(loader))
        assert set(opened) == {rank, rank + 3}
    alone = taken(loader_for(ShardedStream(sizes, shard), sampling=Stream(8, sum(sizes))))
    together = [sorted(itertools.chain.from_iterable(parts)) for parts in zip(*found, strict=True)]
    assert together == [sorted(batch) for batch in alone]
    assert sorted(itertools.chain.from_iterable(alone)) == [100 * s + i for s in range(6) for i in range(sizes[s])]


# -- what is billed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
def test_a_pass_costs_one_participation_whatever_its_batches(passes):
    step = step_of(Stream(B, N, passes), steps=passes)
    loader = step.batches(Records())
    for _ in range(passes):
        for batch in loader:
            step(batch)
    assert step.ledger.event() == PartitionEvent(passes, GaussianEvent(1.0))
    assert math.isclose(step.epsilon(1e-5), get_epsilon(GaussianEvent(1.0 / math.sqrt(passes)), 1e-5), rel_tol=1e-9)


@pytest.mark.parametrize(
    "noise", [BandMF(1.0, (1.0, 0.5)), BLT(1.0, (0.3,), (0.9,)), LambdaCGD(1.0, 0.8)], ids=lambda n: type(n).__name__
)
def test_correlated_noise_goes_on_over_the_passes_of_a_stream_as_over_those_of_a_partition(noise):
    step = step_of(Stream(B, N, passes=2), noise=noise, steps=2, seed=1)
    other = step_of(Partition(batch_size=B, dataset_size=N), noise=noise, steps=2, seed=1)
    for each, data in ((step, Records()), (other, records())):
        loader = each.batches(data)
        for _ in range(2):
            for batch in loader:
                each(batch)
    assert step.ledger.event() == other.ledger.event() == CorrelatedEvent(2, S, noise.event)
    assert torch.equal(step.model.weight, other.model.weight)


def test_the_papers_door_takes_a_loader_of_a_stream_with_virtual_steps():
    engine, model, optimizer, loader = at_the_papers_door(Stream(B, N), DataLoader(Records(), batch_size=B))
    seen = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        for batch in parts:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            seen += batch[:, 0].int().tolist()
    assert seen == list(range(N))
    assert engine.ledger.event() == PartitionEvent(1, GaussianEvent(1.0))


def test_padded_steps_and_small_physical_batches_are_those_of_one_piece():
    found = []
    for performance in (None, Performance(physical_batch_size=2), Performance(padded=True, physical_batch_size=4)):
        step = step_of(Stream(B, N), seed=3, performance=performance)
        for batch in step.batches(Records()):
            step(batch)
        found.append(step.model.weight.detach().clone())
    assert torch.allclose(found[0], found[1], rtol=1e-9)
    assert torch.allclose(found[0], found[2], rtol=1e-9)


def test_a_resumed_run_goes_on_in_the_middle_as_an_uninterrupted_one(tmp_path):
    def run(stop):
        step = step_of(Stream(B, N), noise=BandMF(1.0, (1.0, 0.5)), seed=5)
        loader = step.batches(Records())
        for batch in itertools.islice(loader, stop):
            step(batch)
        return step, loader

    whole, _ = run(S)
    begun, loader = run(1)
    begun.save_checkpoint(tmp_path / "run.pt")
    state = loader.state_dict()
    resumed = step_of(Stream(B, N), noise=BandMF(1.0, (1.0, 0.5)), seed=5)
    resumed.load_checkpoint(tmp_path / "run.pt")
    again = resumed.batches(Records())
    again.load_state_dict(state)
    for batch in again:
        resumed(batch)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    with pytest.raises(ProtocolError, match="declares 1"):
        next(iter(again))
    # Steps after the checkpoint may have been taken, so that the pass is billed again.
    assert resumed.ledger.event() == CorrelatedEvent(2, S, BandMF(1.0, (1.0, 0.5)).event)


# -- what is refused ---------------------------------------------------------------------------------------------------


def unchanged_after(step, refused, match):
    """Asserts that a batch is refused with the ledger, the weights and the number of steps as they were."""
    before = step.ledger.event(), step.model.weight.detach().clone()
    with pytest.raises(ProtocolError, match=match):
        refused()
    assert step.ledger.event() == before[0]
    assert torch.equal(step.model.weight, before[1])


def test_a_stream_read_twice_beyond_the_plan_is_refused():
    step = step_of(Stream(B, N))
    loader = step.batches(Records())
    for batch in loader:
        step(batch)
    unchanged_after(step, lambda: next(iter(loader)), "pass 2 over a stream would begin, and .* declares 1")
    another = step.batches(Records())  # a new loader is no way around it
    unchanged_after(step, lambda: next(iter(another)), "pass 2 over a stream would begin")
    loader.load_state_dict({**loader.state_dict(), "batches": {**loader.state_dict()["batches"], "handed_over": 1}})
    unchanged_after(step, lambda: next(iter(loader)), "pass 2 over a stream would begin")


def test_two_passes_at_once_are_refused_at_the_step():
    step = step_of(Stream(B, N))
    first, second = (iter(step.batches(Records())) for _ in range(2))
    one, other = next(first), next(second)
    step(one)
    unchanged_after(step, lambda: step(other), "pass 2 over a stream would begin")


def test_more_passes_than_declared_cannot_be_planned():
    with pytest.raises(ConfigurationError, match=r"3 passes are planned over .*passes=2.*passes=3"):
        Mechanism(sampling=Stream(B, N, passes=2), clipping=Flat(1.0), noise=Gaussian(1.0), steps=3).event()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Records(N - 1), "Records ended after 9 records, and 10 are declared"),
        (Records(N + 1), "goes on after the 10 records"),
        (Repeated(N), "goes on after the 10 records"),
    ],
    ids=["early", "late", "each twice"],
)
def test_a_stream_of_another_length_is_refused_before_the_batch_that_shows_it(data, match):
    step = step_of(Stream(B, N))
    batches = iter(step.batches(data))
    for _ in range(S - 1):
        step(next(batches))
    unchanged_after(step, lambda: next(batches), match)


def test_a_stream_that_deals_its_records_to_workers_is_not_taken_for_a_whole():
    loader = loader_for(Records(dealt=True), sampling=Stream(B, N), num_workers=1)
    assert taken(loader) == IN_ORDER  # one worker is given all


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader_for(Records(), sampling=Stream(B, N), num_workers=2),
        lambda: privatize_loader(DataLoader(Records(), batch_size=B, num_workers=2), sampling=Stream(B, N)),
    ],
    ids=["loader_for", "privatize_loader"],
)
def test_workers_that_would_each_read_the_whole_stream_are_refused(make):
    with pytest.raises(ConfigurationError, match="num_workers=2 with a stream of one part: each worker would read"):
        make()


def test_ranks_that_would_each_read_the_whole_stream_are_refused():
    with pytest.raises(ConfigurationError, match="2 ranks with a stream of one part"):
        loader_for(Records(), sampling=Stream(B, N), share=Share(rank=0, ranks=2))


def test_a_stream_that_is_read_at_two_places_at_once_is_refused():
    loader = loader_for(Records(), sampling=Stream(B, N, passes=2))
    first, second = iter(loader), iter(loader)
    next(first)
    next(second)
    next(first)
    with pytest.raises(ProtocolError, match="it is read at two places at once"):
        next(second)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: loader_for(Records(), sampling=Poisson(0.1)), "IterableDataset, from which no example can be drawn"),
        (lambda: loader_for(Records(), sampling=Partition(batch_size=B)), "sampling=Stream"),
        (lambda: loader_for(records(), sampling=Stream(B, N + 1)), "is for 11 examples, and there are 10"),
        (lambda: loader_for(ShardedStream([N], lambda _: records()), sampling=Poisson(0.1)), "in its order alone"),
        (lambda: privatize_loader(DataLoader(records(), B, shuffle=True), sampling=Stream(B, N)), "its own order"),
        (lambda: privatize_loader(DataLoader(Records(), B + 2), sampling=Stream(B, N)), "draws 4 of 10"),
        (lambda: loader_for(ShardedStream([N], iter), sampling=Stream(B, N), share=Share(1, 2)), "1 shards cannot be"),
        (lambda: ShardedStream([], iter), "got none"),
        (lambda: Stream(0, N), "batch_size"),
        (lambda: Stream(B, N).scaled(0.5), "no rate to schedule"),
    ],
)
def test_what_no_bound_covers_is_refused(make, match):
    with pytest.raises(ConfigurationError, match=match):
        make()


def test_a_data_set_with_random_access_is_read_in_order_too():
    data = ShardedDataset([4, 6], lambda s: records()[:4] if s == 0 else records()[4:])
    assert taken(loader_for(data, sampling=Stream(B, N), num_workers=2)) == IN_ORDER
