"""The private loader: batches as drawn, each announced, in order, with the user's own options; and each refusal."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from privet.errors import ConfigurationError, ProtocolError
from privet.noise import NoiseKey
from privet.sampling import Partition, Poisson, PrivateLoader, loader_for, privatize_loader
from tests.sampling.law import refutations

SIZE = 40
DATA = TensorDataset(torch.arange(SIZE), torch.arange(SIZE)[:, None].expand(SIZE, 3).float())


def known(seed: int = 0) -> NoiseKey:
    return NoiseKey.from_generator(torch.Generator().manual_seed(seed))


def indices(loader) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def heard(loader: PrivateLoader) -> list:
    tickets: list = []
    loader.on_batch(tickets.append)
    return tickets


def negated(examples):
    return torch.stack([-example[0] for example in examples])


def mark_worker(number):
    torch.manual_seed(number)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_is_announced_before_it_comes(workers, poisson):
    plain = DataLoader(DATA, batch_size=1 if poisson else 7, num_workers=workers, persistent_workers=workers > 0)
    loader = privatize_loader(plain, poisson=poisson)
    tickets = heard(loader)
    handed_over = 0
    for begun in (1, 2):
        for index, (numbers, rows) in enumerate(loader):
            ticket = tickets[-1]
            assert (ticket.step, ticket.index, ticket.passes) == (handed_over, index, begun)
            assert ticket.size == len(numbers) == len(rows)
            assert ticket.last
            assert rows.shape[1:] == (3,)
            assert rows.dtype == torch.float32
            assert torch.equal(rows[:, 0], numbers.float())
            handed_over += 1
    assert handed_over == len(tickets) == 2 * len(loader) == 2 * (SIZE if poisson else 6)
    if poisson:
        assert min(ticket.size for ticket in tickets) == 0  # missed with probability 1e-16


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_prefetching_do_not_change_the_batches(workers):
    loader = privatize_loader(DataLoader(DATA, batch_size=2, num_workers=workers), key=known())
    plain = privatize_loader(DataLoader(DATA, batch_size=2), key=known())
    assert [indices(loader), indices(loader)] == [indices(plain), indices(plain)]


def test_it_is_an_ordinary_loader_with_the_users_options():
    generator = torch.Generator()
    plain = DataLoader(
        DATA,
        batch_size=4,
        shuffle=True,
        num_workers=2,
        collate_fn=negated,
        timeout=30,
        worker_init_fn=mark_worker,
        prefetch_factor=3,
        persistent_workers=True,
        generator=generator,
        multiprocessing_context="fork",
        drop_last=True,
    )
    loader = privatize_loader(plain)
    assert isinstance(loader, DataLoader)
    kept = ("dataset", "num_workers", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers", "generator")
    for name in (*kept, "pin_memory", "multiprocessing_context"):
        assert getattr(loader, name) is getattr(plain, name) or getattr(loader, name) == getattr(plain, name)
    assert (loader.batch_size, loader.expected_batch_size, loader.dataset_size) == (4, 4, SIZE)
    assert len(loader) == 10
    for batch in loader:
        assert (batch <= 0).all()


def test_spawned_workers_get_what_they_need():
    plain = DataLoader(DATA, batch_size=20, num_workers=1, collate_fn=negated, multiprocessing_context="spawn")
    assert sum(len(batch) for batch in privatize_loader(plain, poisson=False)) == SIZE


def test_the_global_seed_does_not_reach_the_batches():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        plain = DataLoader(DATA, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0))
        runs.append(indices(privatize_loader(plain)))
    assert runs[0] != runs[1]
    same = [indices(privatize_loader(DataLoader(DATA, batch_size=10), key=known())) for _ in range(2)]
    assert same[0] == same[1]
    assert privatize_loader(DataLoader(DATA, batch_size=10), key=known()).predictable
    assert not privatize_loader(DataLoader(DATA, batch_size=10)).predictable


def test_sizes_are_random_and_the_rate_is_that_of_the_public_numbers():
    loader = privatize_loader(DataLoader(DATA, batch_size=9), key=known())
    assert loader.sampling == Poisson(9 / 40)
    assert len(loader) == 5
    counts = Counter(number for _ in range(200) for batch in indices(loader) for number in batch)
    assert all(abs(counts[number] - 225) < 6 * (1000 * 0.225 * 0.775) ** 0.5 for number in range(SIZE))


def test_the_batches_of_a_loader_have_the_law_within_and_across_passes():
    loader = loader_for(DATA, sampling=Poisson(0.2), key=known(), steps=5)
    mask = np.zeros((2500, SIZE), dtype=bool)
    batches = [batch for _ in range(500) for batch in indices(loader)]
    for row, batch in zip(mask, batches, strict=True):
        row[batch] = True
    assert refutations(mask, 0.2) == []
    assert refutations(mask.reshape(500, 5, SIZE).transpose(1, 0, 2).reshape(2500, SIZE), 0.2) == []


def test_passes_and_concurrent_passes_draw_different_batches():
    loader = privatize_loader(DataLoader(DATA, batch_size=20), key=known())
    tickets = heard(loader)
    assert indices(loader) != indices(loader)
    pairs = [(one[0].tolist(), two[0].tolist()) for one, two in zip(loader, loader, strict=True)]
    assert all(one != two for one, two in pairs)
    assert [ticket.step for ticket in tickets] == list(range(8))
    assert [ticket.passes for ticket in tickets] == [1, 1, 2, 2, 3, 4, 3, 4]


def test_a_pass_that_was_left_is_followed_by_a_new_one():
    loader = privatize_loader(DataLoader(DATA, batch_size=10), poisson=False)
    tickets = heard(loader)
    for _ in loader:
        break
    assert [batch[0] for batch in indices(loader)] == [0, 10, 20, 30]
    assert [(ticket.passes, ticket.index) for ticket in tickets] == [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    assert loader.passes_begun == 2


def test_a_partition_keeps_its_order():
    plain = DataLoader(DATA, batch_size=7)
    loader = privatize_loader(plain, poisson=False)
    assert loader.sampling == Partition(shuffled=False, batch_size=7)
    assert indices(loader) == indices(plain)
    short = privatize_loader(DataLoader(DATA, batch_size=7, drop_last=True), poisson=False)
    assert indices(short) == indices(plain)[:5]
    shuffled = privatize_loader(DataLoader(DATA, batch_size=7, shuffle=True), poisson=False)
    assert shuffled.sampling == Partition(shuffled=True, batch_size=7)
    orders = [[number for batch in indices(shuffled) for number in batch] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(SIZE))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(SIZE))


def test_a_declared_size_sets_the_rate_and_the_steps():
    loader = privatize_loader(DataLoader(DATA, batch_size=10), dataset_size=41)
    assert loader.sampling == Poisson(10 / 41)
    assert (len(loader), loader.dataset_size) == (5, 41)


def test_the_length_is_read_once():
    class Growing(Dataset):
        size = 10

        def __len__(self):
            self.size += 10
            return self.size

        def __getitem__(self, index):
            return torch.tensor(index)

    loader = privatize_loader(DataLoader(Growing(), batch_size=10))
    assert loader.sampling == Poisson(10 / loader.dataset_size)
    rate = loader.sampling.rate
    list(loader)
    assert loader.sampling.rate == rate


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(10)


class Lengthless(Dataset):
    def __getitem__(self, index):
        return torch.tensor(index)


class Overriding(DataLoader):
    def __iter__(self):
        yield from ()


class OwnBatches(BatchSampler):
    pass


def unsized_loader() -> DataLoader:
    return DataLoader(Lengthless(), batch_size=4)


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "Stream is an IterableDataset.*map-style"),
        (unsized_loader, "Lengthless has no length.*__len__"),
        (
            lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
            "WeightedRandomSampler",
        ),
        (
            lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(5))),
            "SubsetRandomSampler.*sampler=",
        ),
        (lambda: DataLoader(DATA, batch_size=4, sampler=list(range(SIZE))), "sampler list"),
        (lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, replacement=True)), "with replacement"),
        (lambda: DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, num_samples=400)), "num_samples"),
        (lambda: DataLoader(DATA, batch_size=4, sampler=SequentialSampler(range(5))), "SequentialSampler"),
        (
            lambda: DataLoader(DATA, batch_sampler=OwnBatches(SequentialSampler(DATA), 4, False)),
            "OwnBatches.*batch_size=",
        ),
        (lambda: DataLoader(DATA, batch_sampler=[[0, 1], [2]]), "batch_sampler list"),
        (lambda: DataLoader(DATA, batch_size=None), "batch_size=None"),
        (lambda: DataLoader(DATA, batch_size=4, num_workers=1, in_order=False), "in_order=True"),
        (lambda: Overriding(DATA, batch_size=4), "Overriding overrides"),
        (lambda: DataLoader(Subset(DATA, []), batch_size=4), "empty"),
        (lambda: [1, 2], "DataLoader, got list"),
        (lambda: privatize_loader(DataLoader(DATA, batch_size=4)), "private already"),
    ],
)
def test_a_loader_of_unknown_law_is_refused(build, message, poisson):
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        privatize_loader(build(), poisson=poisson)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match=r"rate above 1.*at most 40"):
        privatize_loader(DataLoader(DATA, batch_size=41))
    with pytest.raises(ConfigurationError, match="at most 5"):
        privatize_loader(DataLoader(DATA, batch_size=10), dataset_size=5)
    with pytest.raises(ConfigurationError, match="dataset_size"):
        privatize_loader(DataLoader(DATA, batch_size=10), dataset_size=0)
    with pytest.raises(ConfigurationError, match="drop_last"):
        privatize_loader(DataLoader(DATA, batch_size=41, drop_last=True), poisson=False)
    assert indices(privatize_loader(DataLoader(DATA, batch_size=41), poisson=False)) == [list(range(SIZE))]


def test_an_impossible_structure_fails_before_training():
    def fussy(examples):
        return {str(number): examples[number] for number in range(max(1, len(examples)))}

    with pytest.raises(ConfigurationError, match="empty"):
        privatize_loader(DataLoader(DATA, batch_size=10, collate_fn=fussy))
    assert list(privatize_loader(DataLoader(DATA, batch_size=20, collate_fn=fussy), poisson=False))


def test_a_batch_that_is_not_the_drawn_one_is_noticed():
    loader = privatize_loader(DataLoader(DATA, batch_size=10), poisson=False)
    begin = loader._batches.begin

    def lossy():
        made = begin()
        plain = made.draw
        made.draw = lambda: (examples[1:] for examples in plain())
        return made

    loader._batches.begin = lossy
    with pytest.raises(ProtocolError, match="another number of examples"):
        list(loader)


def test_a_loader_that_is_built_anew_from_the_parts_of_a_private_one_is_refused():
    loader = privatize_loader(DataLoader(DATA, batch_size=20))
    tickets = heard(loader)
    for collate_fn in (None, loader.collate_fn):
        around = DataLoader(DATA, batch_sampler=loader.batch_sampler, collate_fn=collate_fn)
        with pytest.raises(
            ProtocolError, match=r"built anew from the parts of a private one.*Expected the loader that"
        ):
            list(around)
    assert tickets == []
    assert len(list(loader)) == len(tickets) == 2
    with pytest.raises(ProtocolError, match="built anew"):
        list(around)


def test_a_listener_can_leave():
    loader = privatize_loader(DataLoader(DATA, batch_size=10), poisson=False)
    tickets: list = []
    end = loader.on_batch(tickets.append)
    next(iter(loader))
    end()
    end()
    list(loader)
    assert len(tickets) == 1


def test_a_listener_that_refuses_stops_the_batch():
    loader = privatize_loader(DataLoader(DATA, batch_size=10), poisson=False)

    def refuse(ticket):
        raise RuntimeError("budget")

    loader.on_batch(refuse)
    with pytest.raises(RuntimeError, match="budget"):
        next(iter(loader))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_copy_draws_other_batches(clone):
    loader = privatize_loader(DataLoader(DATA, batch_size=20, shuffle=True))
    tickets = heard(loader)
    other = clone(loader)
    assert indices(other) != indices(loader)
    assert len(tickets) == 2  # the copy has listeners of its own
    fixed = privatize_loader(DataLoader(DATA, batch_size=20), key=known())
    assert indices(clone(fixed)) == indices(fixed)
    shuffled = privatize_loader(DataLoader(DATA, batch_size=20, shuffle=True), poisson=False)
    next(iter(shuffled))  # its order is at hand
    assert indices(clone(shuffled)) != indices(shuffled)


def test_no_key_is_saved():
    key = NoiseKey.fresh()
    loader = privatize_loader(DataLoader(DATA, batch_size=20), key=key)
    list(loader)
    for secret in (key._secret, key.derive("sampling"), loader._batches._stream._keys.at(1 << 32)):
        assert secret not in pickle.dumps(loader)
        assert secret.hex() not in str(loader.state_dict())


def test_a_key_serves_one_loader():
    key = NoiseKey.fresh()
    privatize_loader(DataLoader(DATA, batch_size=20), key=key)
    with pytest.raises(ProtocolError, match="its own key"):
        privatize_loader(DataLoader(DATA, batch_size=20), key=key)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 3, "shuffle": True, "poisson": False}])
def test_a_reproducible_run_resumes_with_its_very_next_batch(options, workers):
    options = dict(options)
    poisson = options.pop("poisson", True)
    build = lambda: privatize_loader(DataLoader(DATA, num_workers=workers, **options), poisson=poisson, key=known())  # noqa: E731
    first, second = build(), build()
    list(first)
    run = iter(first)
    for _ in range(5):
        next(run)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    tickets, others = heard(first), heard(second)
    rest = [batch[0].tolist() for batch in run]
    assert [batch[0].tolist() for batch in second] == rest
    assert others == tickets
    assert indices(second) == indices(first)
    assert others == tickets
    done = build()
    done.load_state_dict(first.state_dict())
    assert indices(done) == indices(first)


def test_any_other_run_resumes_with_a_fresh_key():
    loader = privatize_loader(DataLoader(DATA, batch_size=20))
    list(loader)
    state = loader.state_dict()
    before = indices(loader)
    loader.load_state_dict(state)
    tickets = heard(loader)
    assert indices(loader) != before
    assert [(ticket.passes, ticket.step) for ticket in tickets] == [(2, 2), (2, 3)]

    shuffled = privatize_loader(DataLoader(DATA, batch_size=20, shuffle=True), poisson=False)
    run = iter(shuffled)
    next(run)
    shuffled.load_state_dict(shuffled.state_dict())
    tickets = heard(shuffled)
    assert sorted(number for batch in indices(shuffled) for number in batch) == list(range(SIZE))
    assert {ticket.passes for ticket in tickets} == {2}  # its order is lost, so a new pass is billed

    whole = privatize_loader(DataLoader(DATA, batch_size=20, shuffle=True), poisson=False)
    list(whole)
    state = whole.state_dict()
    second = indices(whole)
    whole.load_state_dict(state)
    assert indices(whole) != second

    ordered = privatize_loader(DataLoader(DATA, batch_size=20), poisson=False)
    run = iter(ordered)
    next(run)
    ordered.load_state_dict(ordered.state_dict())
    assert indices(ordered) == [list(range(20, 40))]


def test_a_state_of_another_loader_is_refused():
    state = privatize_loader(DataLoader(DATA, batch_size=20), key=known()).state_dict()
    for other in (
        privatize_loader(DataLoader(DATA, batch_size=10), key=known()),
        privatize_loader(DataLoader(DATA, batch_size=20), key=known(1)),
        privatize_loader(DataLoader(DATA, batch_size=20)),
        privatize_loader(DataLoader(DATA, batch_size=20), poisson=False, key=known()),
    ):
        with pytest.raises(ConfigurationError, match="state of this loader"):
            other.load_state_dict(state)


def test_the_explicit_door():
    loader = loader_for(DATA, sampling=Poisson(0.3), key=known(), steps=25)
    assert len(indices(loader)) == len(loader) == 25
    assert loader.expected_batch_size == pytest.approx(12)
    assert len(loader_for(DATA, sampling=Poisson(0.3))) == 4
    assert len(indices(loader_for(DATA, sampling=Partition(), batch_size=9, collate_fn=None))) == 5
    assert all((b <= 0).all() for b in loader_for(DATA, sampling=Poisson(0.2), collate_fn=negated))
    with pytest.raises(ConfigurationError, match="batch_size"):
        loader_for(DATA, sampling=Partition())
    with pytest.raises(ConfigurationError, match="no batch_size"):
        loader_for(DATA, sampling=Poisson(0.2), batch_size=8)
    with pytest.raises(ConfigurationError, match="steps"):
        loader_for(DATA, sampling=Poisson(0.2), steps=0)
    with pytest.raises(ConfigurationError, match=r"2\*\*32"):
        loader_for(DATA, sampling=Poisson(1e-12))


def test_rate_zero_gives_empty_batches_and_rate_one_everybody():
    assert indices(loader_for(DATA, sampling=Poisson(0.0), steps=3)) == [[], [], []]
    assert indices(loader_for(DATA, sampling=Poisson(1.0))) == [list(range(SIZE))]


def test_a_state_is_of_the_newest_pass():
    loader = privatize_loader(DataLoader(DATA, batch_size=10), poisson=False)
    older, newer = iter(loader), iter(loader)
    for run in (older, newer, older, older):
        next(run)
    state = loader.state_dict()["batches"]
    assert (state["passes"], state["handed_over"]) == (2, 1)
