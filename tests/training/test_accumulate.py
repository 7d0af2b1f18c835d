"""Accumulation as people write it: k backwards and one step are one step on one large batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    Accumulate,
    BatchMemoryManager,
    BudgetExceededError,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Poisson,
    PrivacyEngine,
    ProtocolError,
)
from privet.clipping import ClippingPolicy
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import NoiseKey
from privet.sampling import BatchTicket, privatize_loader
from privet.schedules import Exponential, Schedule
from privet.training.accumulated_sum import AccumulatedSum
from tests.contracts.doors import Expected, assert_exact, reference, taken

torch.set_num_threads(1)
N, PHYSICAL, K, CLIP = 30, 4, 3, 0.5
Batch = tuple[Tensor, Tensor]


def entropy(net: nn.Module, batch: Any) -> Tensor:  # (B,)
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


class Run:
    """A private run that accumulates, and what its optimizer saw."""

    def __init__(self, *, sigma: float = 0.0, accumulate: int | Accumulate = K, **options: Any) -> None:
        torch.manual_seed(0)
        self.data = TensorDataset(torch.randn(N, 5), torch.randint(0, 3, (N,)))
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        self.start = copy.deepcopy(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=options.pop("lr", 0.0))
        self.engine = PrivacyEngine(accountant="rdp")
        _, _, self.loader, *rest = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(self.data, batch_size=PHYSICAL, num_workers=options.pop("num_workers", 0)),
            noise_multiplier=sigma,
            max_grad_norm=CLIP,
            noise_generator=torch.Generator().manual_seed(options.pop("seed", 3)),
            accumulate=accumulate,
            **options,
        )
        self.criterion = rest[0] if rest else nn.CrossEntropyLoss(reduction=options.get("loss_reduction", "mean"))
        self.seen = taken(self.net, self.optimizer)
        self.parts: list[list[Batch]] = [[]]

    def backward(self, batch: Any, *, divisor: float = K) -> None:
        x, y = batch
        (self.criterion(self.net(x), y) / divisor).backward()

    def release(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def trained(self, batches: Iterable[Any] | None = None, *, divisor: float = K) -> Run:
        """Runs the loop that people write."""
        for i, batch in enumerate(self.loader if batches is None else batches):
            self.parts[-1].append((batch[0].clone(), batch[1].clone()))
            self.backward(batch, divisor=divisor)
            if (i + 1) % K == 0:
                self.release()
                self.parts.append([])
        return self

    def assert_as_whole(self, *, divisor: float = PHYSICAL * K) -> None:
        """Asserts that each step's gradient was that of its parts in one batch."""
        wholes = [(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for parts in self.parts[:-1]]
        assert len(self.seen) == len(wholes) > 0
        assert self.parts[-1] == []
        for found, whole in zip(self.seen, wholes, strict=True):
            if len(whole[0]) == 0:
                assert all(not value.any() for value in found.values())
                continue
            expected = reference(self.start, whole, loss=entropy, policy=Flat(CLIP))
            ours = {name: value * divisor for name, value in found.items()}
            assert_exact(ours, expected, tolerance=1e-5)


# -- the sum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "divisor"),
    [
        ({}, K),
        ({"accumulate": Accumulate(K, divided=False)}, 1),
        ({"criterion": nn.CrossEntropyLoss()}, K),
        ({"num_workers": 1}, K),
        ({"poisson_sampling": False}, K),
    ],
)
def test_uneven_and_empty_parts_are_one_large_batch(options, divisor):
    run = Run(**options)
    for _ in range(1 if run.loader.num_workers else 3):
        run.trained(divisor=divisor)
    sizes = [[len(x) for x, _ in parts] for parts in run.parts[:-1]]
    if run.loader.sampling.random_size and not run.loader.num_workers:
        assert any(len(set(each)) > 1 for each in sizes)
    run.assert_as_whole()


def test_a_sum_needs_no_division():
    run = Run(loss_reduction="sum").trained(divisor=1)
    run.assert_as_whole(divisor=1)


def test_a_logical_batch_smaller_than_k_has_empty_parts_and_one_step():
    run = Run(sampling=Poisson(0.0001), dataset_size=N * 4000)
    found = [len(x) for x, _ in itertools.islice(iter(run.loader), 6 * K)]
    assert 0 in found
    run = Run(sampling=Poisson(0.0001), dataset_size=N * 4000)
    run.trained(itertools.islice(iter(run.loader), 6 * K))
    assert len(run.seen) == run.engine.ledger.steps == 6
    for found, parts in zip(run.seen, run.parts[:-1], strict=True):
        assert any(value.any() for value in found.values()) == any(len(x) for x, _ in parts)


@pytest.mark.parametrize("poisson", [True, False])
def test_each_example_of_a_logical_batch_is_in_one_part(poisson):
    data = TensorDataset(torch.arange(N))
    draw = {"poisson": poisson, "key": NoiseKey.from_generator(torch.Generator().manual_seed(1))}
    parts = privatize_loader(DataLoader(data, batch_size=PHYSICAL), accumulate=K, **draw)
    draw["key"] = NoiseKey.from_generator(torch.Generator().manual_seed(1))
    whole = privatize_loader(DataLoader(data, batch_size=PHYSICAL * K), **draw)
    for _ in range(4):
        found = [x.tolist() for (x,) in parts]
        for i, (x,) in enumerate(whole):
            of_batch = found[K * i : K * (i + 1)]
            assert [each for part in of_batch for each in part] == x.tolist()
            assert max(map(len, of_batch)) - min(map(len, of_batch)) <= 1


def test_the_loader_counts_its_batches_and_the_ledger_its_steps():
    run = Run(sigma=1.0)
    steps = -(-N // (PHYSICAL * K))
    assert len(run.loader) == steps * K == sum(1 for _ in run.loader)
    assert run.loader.batch_size == PHYSICAL
    run.trained()
    assert run.engine.ledger.steps == steps
    planned = Mechanism(sampling=Poisson(PHYSICAL * K / N), clipping=Flat(CLIP), noise=Gaussian(1.0), steps=steps)
    assert run.engine.epsilon(1e-5) == planned.epsilon(1e-5, accountant="rdp")


def test_the_noise_that_a_target_asks_for_counts_logical_steps():
    net = nn.Linear(5, 3)
    data = TensorDataset(torch.randn(200, 5), torch.randint(0, 3, (200,)))
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
        accumulate=4,
    )
    (mechanism,) = engine.mechanisms
    assert mechanism.sampling == Poisson(0.1)
    planned = Mechanism(sampling=mechanism.sampling, clipping=Flat(1.0), noise=mechanism.noise, steps=20)
    assert 2.9 < planned.epsilon(1e-5, accountant="rdp") <= 3.0


def test_the_noise_is_that_of_one_step_of_one_batch():
    """The same key draws the same noise once, whatever the number of parts."""
    whole, parts = Run(sigma=1.0, accumulate=1), Run(sigma=1.0)
    whole_sum, parts_sum = Run(accumulate=1), Run()
    for run in (parts, parts_sum):
        run.trained(itertools.islice(iter(run.loader), K))
    for run in (whole, whole_sum):
        run.backward(next(iter(run.loader)), divisor=1)
        run.release()
    for name, value in parts.seen[0].items():
        ours = (value - parts_sum.seen[0][name]) * PHYSICAL * K
        theirs = (whole.seen[0][name] - whole_sum.seen[0][name]) * PHYSICAL
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# -- loops of frameworks -----------------------------------------------------------------------------------------------


def read_ahead(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Yields batches of which `count` more are read already, as prefetchers and trainers do."""
    kept: list[Any] = []
    for batch in batches:
        kept.append(batch)
        if len(kept) > count:
            yield kept.pop(0)
    yield from kept


@pytest.mark.parametrize("count", [1, K, 2 * K + 1])
@pytest.mark.parametrize("copied", [False, True])
def test_batches_may_be_read_ahead_also_in_new_tensors(count, copied, recwarn):
    run = Run(sigma=0.0)
    batches = read_ahead(run.loader, count)
    run.trained(((x.clone(), y.clone()) for x, y in batches) if copied else batches)
    run.assert_as_whole()
    assert run.engine.ledger.steps == run.loader.steps_per_pass
    marks = {"reproducible key", *(["batches read ahead or left out"] if copied else [])}
    assert set(run.engine.ledger.marks) == marks
    assert len([w for w in recwarn if "read ahead" in str(w.message)]) == copied


def test_copies_without_reading_ahead_leave_no_doubt(recwarn):
    run = Run()
    run.trained((x.clone(), y.clone()) for x, y in run.loader)
    run.assert_as_whole()
    assert run.engine.ledger.marks == ("reproducible key",)
    assert [w for w in recwarn if "read ahead" in str(w.message)] == []


def test_a_step_that_the_budget_refuses_leaves_nothing_of_its_parts():
    run = Run(sigma=1.0)
    run.engine.set_budget(epsilon=12.0, delta=1e-5)
    for_ever = itertools.chain.from_iterable(itertools.repeat(run.loader))
    with pytest.raises(BudgetExceededError):
        run.trained(for_ever)
    run.optimizer.zero_grad()
    assert run.engine.ledger.steps == len(run.seen) > 0
    assert run.engine.epsilon(1e-5) <= 12.0
    with pytest.raises(ProtocolError, match="no backward since"):
        run.optimizer.step()


def test_batches_may_be_read_ahead_over_the_end_of_a_pass():
    run = Run()
    run.trained(read_ahead(itertools.chain(run.loader, run.loader), 2))
    run.assert_as_whole()
    assert run.engine.ledger.steps == 2 * run.loader.steps_per_pass


def test_a_closure_brings_the_last_part_and_zero_grad_comes_before_the_first():
    run = Run()
    for i, batch in enumerate(run.loader):
        run.parts[-1].append(batch)

        def closure(i=i, batch=batch):
            if i % K == 0:
                run.optimizer.zero_grad()
            run.backward(batch)

        if (i + 1) % K == 0:
            run.optimizer.step(closure)
            run.parts.append([])
        else:
            closure()
    run.assert_as_whole()


def test_schedules_move_between_logical_steps_alone():
    run = Run(sigma=1.0)
    schedule = Schedule(run.optimizer, noise=Exponential(0.5), rate=Exponential(1.1))
    for i, batch in enumerate(read_ahead(run.loader, 1)):
        run.backward(batch)
        if (i + 1) % K == 0:
            run.release()
            schedule.step()
        else:
            with pytest.raises(ProtocolError, match="inside a logical step"):
                schedule.step()
    (mechanism,) = run.engine.mechanisms
    assert mechanism.noise.multiplier == 0.5**run.loader.steps_per_pass


def test_a_run_resumes_at_a_logical_batch():
    run = Run(sigma=1.0, lr=0.1)
    unbroken = Run(sigma=1.0, lr=0.1).trained()
    batches = iter(run.loader)
    run.trained(itertools.islice(batches, K))
    run.backward(next(batches))  # of the next logical batch, which nothing is released of
    state = copy.deepcopy({"engine": run.engine.state_dict(), "loader": run.loader.state_dict()})
    weights = copy.deepcopy(run.net.state_dict())
    other = Run(sigma=1.0, lr=0.1)
    other.net.load_state_dict(weights)
    other.engine.load_state_dict(state["engine"])
    other.loader.load_state_dict(state["loader"])
    other.trained()
    assert len(other.seen) == run.loader.steps_per_pass - 1
    assert other.engine.epsilon(1e-5) == unbroken.engine.epsilon(1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_step_that_comes_too_early_is_refused_and_nothing_is_lost():
    run = Run()
    batches = iter(run.loader)
    with pytest.raises(ProtocolError, match="no backward since"):
        run.optimizer.step()
    for i in range(K):
        if i:
            with pytest.raises(ProtocolError, match=rf"after backward {i} of {K}.*every {K}th backward"):
                run.optimizer.step()
            with pytest.raises(ProtocolError, match="throws away"):
                run.optimizer.zero_grad()
        run.parts[-1].append(batch := next(batches))
        run.backward(batch)
    assert run.engine.ledger.steps == 0
    run.release()
    run.parts.append([])
    run.assert_as_whole()


def test_a_step_that_comes_too_late_is_refused():
    run = Run()
    batches = iter(run.loader)
    for _ in range(K):
        run.backward(next(batches))
    with pytest.raises(ProtocolError, match=r"before the optimizer's step.*optimizer.step\(\); optimizer.zero_grad"):
        run.backward(next(batches))
    assert run.engine.ledger.steps == 0


@pytest.mark.parametrize("copied", [False, True])
def test_a_part_is_trained_on_once(copied):
    run = Run()
    batches = iter(run.loader)
    first = next(batches)
    run.backward(first)
    again = tuple(t.clone() for t in first) if copied else first
    with pytest.raises(ProtocolError, match="in the sum twice"):
        run.backward(again)


def test_a_part_that_was_trained_on_is_known_while_others_wait():
    run = Run()
    batches = iter(run.loader)
    first, second = next(batches), next(batches)
    run.backward(first)
    with pytest.raises(ProtocolError, match="in the sum twice"):
        run.backward(first)
    del second


def test_a_part_that_was_left_out_is_refused():
    run = Run()
    batches = iter(run.loader)
    next(batches)
    second = next(batches)
    with pytest.raises(ProtocolError, match=f"left out before backward 1 of {K}"):
        run.backward(second)


def test_rows_that_are_no_examples_are_refused():
    run = Run()
    x, y = next(iter(run.loader))
    with pytest.raises(ProtocolError, match="one row for each example"):
        run.backward((torch.cat([x, x]), torch.cat([y, y])))


def test_a_batch_of_the_users_own_is_refused():
    run = Run()
    with pytest.raises(ProtocolError, match="did not hand over"):
        run.backward(next(iter(DataLoader(run.data, batch_size=PHYSICAL))))


def test_a_pass_that_is_left_early_leaves_nothing():
    run = Run()
    batches = iter(run.loader)
    run.backward(next(batches))
    del batches
    run.trained()
    run.assert_as_whole()
    assert run.engine.ledger.steps == run.loader.steps_per_pass


def test_a_loss_that_is_divided_by_nothing_is_refused_where_it_is_declared():
    run = Run()
    batches = iter(run.loader)
    with pytest.raises(ConfigurationError, match=r"\(loss / 3\).backward\(\).*divided=False"):
        run.criterion(run.net((batch := next(batches))[0]), batch[1]).backward()
    with pytest.raises(ConfigurationError, match="divided by nothing"):
        (run := Run(criterion=nn.CrossEntropyLoss())).criterion(
            run.net((batch := next(iter(run.loader)))[0]), batch[1]
        ).backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": 2.5}, "accumulate"),
        ({"grad_sample_mode": "hooks"}, "BatchMemoryManager"),
        ({"accumulate": 20}, "rate above 1"),
        ({"sampling": Poisson(PHYSICAL / N)}, "accumulate=3"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ConfigurationError, match=words):
        Run(**options)


def test_virtual_steps_are_refused_beside_it():
    run = Run()
    with pytest.raises(ConfigurationError, match="accumulate=3"):
        BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer)


def test_where_it_is_not_declared_the_error_shows_what_to_write():
    run = Run(accumulate=1)
    batches = iter(run.loader)
    run.backward(next(batches))
    with pytest.raises(ProtocolError, match=r"accumulate=k\)[\s\S]*with BatchMemoryManager\("):
        run.backward(next(batches))


# -- planted bugs ------------------------------------------------------------------------------------------------------


def _kept_once(self: AccumulatedSum, clipped: ClippedSum, *, examples: int, known: BatchTicket | None) -> None:
    self._taken.append(self._next(examples, known))
    self._gathered = clipped  # the parts before are lost


def test_a_sum_of_the_last_part_alone_would_be_seen(monkeypatch):
    monkeypatch.setattr(AccumulatedSum, "receive", _kept_once)
    with pytest.raises(AssertionError):
        Run().trained().assert_as_whole()


def test_a_clip_norm_that_the_division_shrank_would_be_seen():
    run = Run(accumulate=Accumulate(K, divided=False)).trained(divisor=K)  # declared otherwise than written
    with pytest.raises(AssertionError):
        run.assert_as_whole()


def test_expected_is_not_trivial():
    """Clipping must matter for the comparisons above to say anything."""
    run = Run()
    batch = next(iter(run.loader))
    tight: ClippingPolicy = Flat(CLIP)
    loose = reference(run.start, batch, loss=entropy, policy=Flat(1e3))
    clipped: Expected = reference(run.start, batch, loss=entropy, policy=tight)
    assert any(not torch.allclose(loose[name], clipped[name]) for name in loose)
