"""Schedules drawn before the run: their law, that they are followed exactly, once, and refused otherwise."""

from __future__ import annotations

import fcntl
import itertools
import json
import shutil
import stat

import numpy as np
import pytest
import torch
from scipy import stats

from privet import (
    BandMF,
    BatchMemoryManager,
    ConfigurationError,
    DrawnSchedule,
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    RandomAllocation,
    Stream,
    TruncatedPoisson,
)
from privet.accounting import (
    GaussianEvent,
    Ledger,
    PartitionEvent,
    PoissonEvent,
    RandomAllocationEvent,
    Relation,
    TruncatedPoissonEvent,
    repeated,
)
from privet.sampling import draw_schedule, loader_for, memberships, offline

N = 200
KEY = bytes(range(32))
DATA = [torch.tensor([float(i), 1.0]) for i in range(N)]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    """Several blocks and chunks, though there are few records."""
    monkeypatch.setattr(offline, "BLOCK", 64)
    monkeypatch.setattr(offline, "_MEMBERSHIPS", 50)
    monkeypatch.setattr(offline, "_BLOCKS_AT_ONCE", 2)


def drawn(tmp_path, law=None, *, size=N, name="schedule", **options):
    return DrawnSchedule.open(
        draw_schedule(tmp_path / name, law or Poisson(0.1), dataset_size=size, **{"key": KEY, **options})
    )


def batches_of(schedule):
    steps, size = schedule.steps_of_a_pass, schedule.dataset_size
    return [
        schedule.draw(None, size=size, number=number, index=index, shared=None)
        for number in range(1, schedule.passes + 1)
        for index in range(steps)
    ]


def step_of(schedule, *, steps=None, seed=None, noise=None, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1).double()
    steps = steps or (schedule.steps if schedule.billed_per == "step" else schedule.passes)
    return PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=schedule, clipping=Flat(1.0), noise=noise or Gaussian(1.0), steps=steps),
        loss_per_example=lambda model, batch: model(batch.double()).square().sum(1),
        noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )


def ids(batch):
    return batch[:, 0].int().tolist()


# -- the law -----------------------------------------------------------------------------------------------------------


def matrix_of(schedule):  # (passes, records, steps)
    found = np.zeros((schedule.passes * schedule.steps_of_a_pass, schedule.dataset_size), dtype=int)
    for index, batch in enumerate(batches_of(schedule)):
        found[index, batch] = 1
    return found.reshape(schedule.passes, schedule.steps_of_a_pass, -1).transpose(0, 2, 1)


def binomial_refuted(counts, trials, rate):
    """Returns the p-value of a chi-square test that counts are Binomial(trials, rate)."""
    edges = [k for k in range(trials + 1) if len(counts) * stats.binom.pmf(k, trials, rate) >= 5]
    observed = np.asarray([(counts == k).sum() for k in edges] + [(~np.isin(counts, edges)).sum()])
    expected = np.asarray([stats.binom.pmf(k, trials, rate) for k in edges])
    expected = len(counts) * np.append(expected, 1.0 - expected.sum())
    return stats.chisquare(observed, expected).pvalue


def independent(cells, rate):
    """Returns the deviation, in standard ones, of the joint count of neighbors in a matrix from rate ** 2."""
    joint = (cells[:-1] * cells[1:]).mean()
    spread = np.sqrt(rate**2 * (1 - rate**2) / cells[1:].size)
    return abs(joint - rate**2) / spread


def test_memberships_of_poisson_are_independent_coins_of_the_rate(tmp_path):
    rate, size = 0.1, 4_000
    cells = matrix_of(drawn(tmp_path, Poisson(rate), size=size, passes=2)).transpose(1, 0, 2).reshape(size, -1)
    assert binomial_refuted(cells.sum(1), 20, rate) > 1e-4  # of a record over all steps
    assert binomial_refuted(cells.sum(1), 20, rate * 1.1) < 1e-6  # the test can fail
    assert stats.kstest(cells.sum(0), stats.norm(size * rate, np.sqrt(size * rate * (1 - rate))).cdf).pvalue > 1e-4
    assert independent(cells.T, rate) < 5  # steps
    assert independent(cells, rate) < 5  # records, also over the border of a block
    assert independent(np.repeat(cells, 2, axis=0), rate) > 5  # the test can fail


def test_random_allocation_puts_each_record_in_exactly_one_step_of_each_pass(tmp_path):
    size, steps = 4_000, 8
    cells = matrix_of(drawn(tmp_path, RandomAllocation(steps), size=size, passes=2))
    assert (cells.sum(2) == 1).all()
    assert stats.chisquare(cells.sum(1).ravel()).pvalue > 1e-4
    first, second = cells.argmax(2)  # the choices of two passes are independent
    table = np.histogram2d(first, second, bins=steps)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_truncated_batch_is_a_random_choice_of_the_whole_one(tmp_path):
    law, whole = TruncatedPoisson(0.1, 20, N), batches_of(drawn(tmp_path, Poisson(0.1), name="whole", passes=30))
    cut = batches_of(drawn(tmp_path, law, passes=30))
    assert max(map(len, cut)) == 20 < max(map(len, whole))
    for kept, all_of_it in zip(cut, whole, strict=True):
        assert len(kept) == min(20, len(all_of_it))
        assert set(kept) <= set(all_of_it)
    lost = [
        all_of_it.index(r) / len(all_of_it)
        for k, all_of_it in zip(cut, whole, strict=True)
        for r in set(all_of_it) - set(k)
    ]
    assert stats.kstest(lost, "uniform").pvalue > 1e-4  # not always the last ones


@pytest.mark.parametrize("law", [Poisson(0.1), RandomAllocation(8)], ids=str)
def test_another_machine_finds_the_steps_of_its_records_with_the_key(tmp_path, law):
    cells = matrix_of(drawn(tmp_path, law, passes=2))
    for number, block in itertools.product((1, 2), range(4)):
        found = memberships(KEY, law, dataset_size=N, number=number, block=block)
        here = np.zeros_like(cells[0])
        here[found.records, found.steps] = 1
        owned = slice(64 * block, 64 * (block + 1))
        assert np.array_equal(here[owned], cells[number - 1, owned])
        assert here.sum() == here[owned].sum()


def test_another_key_is_another_schedule(tmp_path):
    found = [batches_of(drawn(tmp_path, name=str(i), key=key)) for i, key in enumerate([KEY, KEY[::-1], None, None])]
    assert all(a != b for a, b in itertools.combinations(found, 2))


# -- it is followed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "event"),
    [
        (Poisson(0.1), repeated(PoissonEvent(0.1, GaussianEvent(1.0)), 10)),
        (TruncatedPoisson(0.1, 22, N), repeated(TruncatedPoissonEvent(0.1, 22, N, GaussianEvent(1.0)), 10)),
        (RandomAllocation(8), RandomAllocationEvent(8, GaussianEvent(1.0))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_explicit_door_hands_over_the_schedule_and_bills_its_law(tmp_path, law, event):
    schedule = drawn(tmp_path, law)
    step = step_of(schedule, performance=Performance(padded=True, physical_batch_size=32))
    expected, seen = batches_of(schedule), []
    for batch in step.batches(DATA):
        step(batch)
        seen.append(ids(batch))
    assert seen == expected
    # A truncated schedule is billed as truncated, never as the cheaper Poisson sampling.
    assert step.ledger.event() == event == step.mechanism.event()
    assert schedule.used == len(seen)


def test_the_papers_door_follows_a_schedule_with_workers_and_virtual_steps(tmp_path):
    schedule = drawn(tmp_path, passes=2)
    expected = [r for batch in batches_of(schedule) for r in batch]
    model, engine = torch.nn.Linear(2, 1), PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(DATA, batch_size=20, num_workers=1),
        sampling=schedule,
        target_epsilon=8.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    seen = []
    for _ in range(2):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=7, optimizer=optimizer) as parts:
            for batch in parts:
                optimizer.zero_grad()
                model(batch).square().mean().backward()
                optimizer.step()
                seen += ids(batch)
    assert seen == expected
    assert 7.5 < engine.epsilon(1e-5) <= 8.0
    with pytest.raises(ProtocolError, match="the schedule has 20 batches, and all were handed over"):
        next(iter(loader))


@pytest.mark.parametrize("law", [Poisson(0.1), RandomAllocation(10)], ids=str)
def test_a_resumed_run_goes_on_as_an_uninterrupted_one(tmp_path, law):
    for name in ("one", "two"):
        drawn(tmp_path, law, name=name)
    whole = step_of(DrawnSchedule.open(tmp_path / "one"), seed=5)
    for batch in whole.batches(DATA):
        whole(batch)

    begun = step_of(DrawnSchedule.open(tmp_path / "two"), seed=5)
    loader = begun.batches(DATA)
    for batch in itertools.islice(loader, 4):
        begun(batch)
    begun.save_checkpoint(tmp_path / "run.pt")
    state = loader.state_dict()
    resumed = step_of(DrawnSchedule.open(tmp_path / "two"), seed=5)
    resumed.load_checkpoint(tmp_path / "run.pt")
    again = resumed.batches(DATA)
    again.load_state_dict(state)
    for batch in again:
        resumed(batch)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    if law.billed_per == "step":
        assert resumed.ledger.event() == whole.ledger.event()


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_the_rest_of_a_pass_of_random_allocation_is_amplified_only_with_the_same_noise(tmp_path, multiplier):
    schedule, ledger = drawn(tmp_path, RandomAllocation(8)), Ledger(relation=Relation.ZERO_OUT)
    whole = RandomAllocationEvent(8, GaussianEvent(1.0))
    first = step_of(schedule, ledger=ledger)
    for batch in itertools.islice(first.batches(DATA), 3):
        first(batch)
    assert ledger.event() == whole
    second = step_of(schedule, noise=Gaussian(multiplier), ledger=ledger)
    for batch in second.batches(DATA):
        second(batch)
    rest = whole if multiplier == 1.0 else PartitionEvent(1, GaussianEvent(2.0))
    assert [(phase.event, phase.count) for phase in ledger.phases] == (
        [(whole, 2)] if rest == whole else [(whole, 1), (rest, 1)]
    )


def test_batches_after_the_checkpoint_do_not_come_again(tmp_path):
    schedule = drawn(tmp_path)
    expected = batches_of(schedule)
    loader = loader_for(DATA, sampling=schedule)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    next(batches), next(batches)  # and then the process dies
    resumed = loader_for(DATA, sampling=schedule)
    resumed.load_state_dict(state)
    assert [ids(batch) for batch in resumed] == expected[3:]


def test_a_pass_that_is_left_goes_on(tmp_path):
    schedule = drawn(tmp_path)
    loader = loader_for(DATA, sampling=schedule, num_workers=0)
    seen = [ids(batch) for batch in itertools.islice(loader, 3)] + [ids(batch) for batch in loader]
    assert seen == batches_of(schedule)


# -- it is refused -----------------------------------------------------------------------------------------------------


def test_a_schedule_is_used_once(tmp_path):
    schedule = drawn(tmp_path)
    step = step_of(schedule)
    loader = step.batches(DATA)
    for batch in loader:
        step(batch)
    before = step.ledger.event()
    for each in (loader, step.batches(DATA), loader_for(DATA, sampling=DrawnSchedule.open(tmp_path / "schedule"))):
        with pytest.raises(ProtocolError, match="all were handed over"):
            next(iter(each))
    assert step.ledger.event() == before
    shutil.copytree(tmp_path / "schedule", tmp_path / "copy")
    assert DrawnSchedule.open(tmp_path / "copy").used == schedule.steps  # the mark is on disk


def test_two_runs_at_once_do_not_share_a_batch(tmp_path):
    schedule = drawn(tmp_path)
    first, second = (iter(loader_for(DATA, sampling=schedule)) for _ in range(2))
    one = ids(next(first))
    assert ids(next(second)) != one
    with pytest.raises(ProtocolError, match="batch 1 of the schedule was handed over before, and 2 were"):
        next(first)


def test_another_process_is_refused(tmp_path):
    schedule = drawn(tmp_path)
    with (tmp_path / "schedule" / "used").open("r+b") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(ProtocolError, match="another process follows the schedule"):
            next(iter(loader_for(DATA, sampling=schedule)))
        assert schedule.used == 0
    next(iter(loader_for(DATA, sampling=schedule)))
    with (tmp_path / "schedule" / "used").open("r+b") as mark, pytest.raises(BlockingIOError):
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_older_copy_of_the_folder_is_refused_at_a_resume(tmp_path):
    schedule = drawn(tmp_path)
    shutil.copytree(tmp_path / "schedule", tmp_path / "copy")
    loader = loader_for(DATA, sampling=schedule)
    next(iter(loader))
    restored = loader_for(DATA, sampling=DrawnSchedule.open(tmp_path / "copy"))
    with pytest.raises(ConfigurationError, match="its folder says 0"):
        restored.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    "other", [{"law": Poisson(0.2)}, {"key": KEY[::-1]}, {"passes": 2}], ids=lambda o: next(iter(o))
)
def test_a_state_is_of_one_schedule(tmp_path, other):
    loader = loader_for(DATA, sampling=drawn(tmp_path))
    another = loader_for(DATA, sampling=drawn(tmp_path, other.pop("law", None), name="other", **other))
    with pytest.raises(ConfigurationError, match="The state of this loader was saved with"):
        another.load_state_dict(loader.state_dict())


def test_files_are_of_their_owner_alone_and_show_nothing(tmp_path):
    schedule = drawn(tmp_path)
    folder = tmp_path / "schedule"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {path.name[:6] for path in folder.iterdir()} == {"chunk-", "schedu", "used"}
    assert len([*folder.iterdir()]) > 4
    assert len(repr(schedule)) < 200
    (folder / "schedule.json").chmod(0o640)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        DrawnSchedule.open(folder)


def test_a_changed_file_is_refused(tmp_path):
    schedule = drawn(tmp_path)
    path = tmp_path / "schedule" / "chunk-000002"
    content = bytearray(path.read_bytes())
    content[-4:] = content[-8:-4]  # a record twice in a batch
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="chunk-000002 is not as it was drawn"):
        batches_of(schedule)
    path.unlink()
    with pytest.raises(ConfigurationError, match="chunk-000002 is not as it was drawn"):
        batches_of(DrawnSchedule.open(tmp_path / "schedule"))
    header = json.loads((tmp_path / "schedule" / "schedule.json").read_bytes())
    header["law"]["rate"] = 0.01  # the digest, and with it every saved state, is another
    (tmp_path / "schedule" / "schedule.json").write_text(json.dumps(header))
    assert DrawnSchedule.open(tmp_path / "schedule").digest != schedule.digest


def test_an_interrupted_drawing_leaves_nothing(tmp_path):
    def interrupt(_part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_schedule(tmp_path / "schedule", Poisson(0.1), dataset_size=N, progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("refused", "match"),
    [
        (lambda s, _: loader_for(DATA[:-1], sampling=s), "drawn for 200 records, and the data set has 199"),
        (lambda s, _: step_of(s, steps=7).batches(DATA), "7 steps are planned, .*Mechanism\\(steps=10"),
        (lambda s, _: step_of(s, steps=11).mechanism.event(), "11 step\\(s\\) are planned, and the schedule has 10"),
        (lambda s, _: step_of(s, noise=BandMF(1.0, (1.0, 0.5))), "correlated"),
        (lambda s, _: s.scaled(0.5), "keeps its rate"),
        (lambda _, path: draw_schedule(path / "schedule", Poisson(0.1), dataset_size=N), "exists"),
        (lambda _, path: draw_schedule(path / "x", Stream(4, N), dataset_size=N), "not drawn beforehand"),
        (lambda _, path: draw_schedule(path / "x", Poisson(0.1), dataset_size=N, key=b"short"), "32 bytes, got 5"),
        (lambda _, path: draw_schedule(path / "x", TruncatedPoisson(0.1, 9, 7), dataset_size=N), "for 7 examples"),
        (lambda _, path: DrawnSchedule.open(path), "holds no schedule"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, refused, match):
    with pytest.raises(ConfigurationError, match=match):
        refused(drawn(tmp_path), tmp_path)
