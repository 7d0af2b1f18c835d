"""Law 2: one row is one example; batches read ahead are billed once, and by neither way cheaper than true."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import Flat, Gaussian, Mechanism, Poisson, PrivacyEngine, PrivateStep, ProtocolError
from privet.accounting.event import GaussianEvent, PartitionEvent, PoissonEvent
from privet.sampling import BatchTicket, Partition
from privet.training import handed_over
from privet.training.virtual_steps import BatchMemoryManager
from tests.contracts.doors import assert_exact, expected_sum, taken

DATA = TensorDataset(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)))
UNSAMPLED = GaussianEvent(2.0)
SAMPLED = PoissonEvent(0.2, UNSAMPLED)
IN_DOUBT = "batches are read ahead, or left out"
LEFT_OUT = "batches of the private loader were left out"


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


class Run:
    """A run over five batches a pass, by either door."""

    def __init__(self, door: str = "paper", *, partition: bool = False, mode: str = "auto") -> None:
        self.net, self.door_name = Net(), door
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)
        self.door: Any
        if door == "paper":
            self.door = PrivacyEngine()
            *_, self.loader = self.door.make_private(
                module=self.net,
                optimizer=self.optimizer,
                data_loader=DataLoader(DATA, batch_size=8),
                noise_multiplier=2.0,
                max_grad_norm=1.0,
                loss_reduction="sum",
                poisson_sampling=not partition,
                grad_sample_mode=mode,
            )
        else:
            sampling = Partition(shuffled=False, batch_size=8) if partition else Poisson(0.2)
            self.door = PrivateStep(
                self.net,
                optimizer=self.optimizer,
                mechanism=Mechanism(sampling=sampling, clipping=Flat(1.0), noise=Gaussian(2.0), steps=5),
                loss_per_example=lambda m, b: m(b[0]).square().sum(1),
            )
            self.loader = self.door.batches(DATA)

    def step(self, x: Tensor) -> None:
        if self.door_name == "explicit":
            self.door([x])
            return
        self.optimizer.zero_grad()
        self.net(x).square().sum().backward()
        self.optimizer.step()

    def train(self, batches: Iterable[Tensor]) -> None:
        for x in batches:
            self.step(x)

    @property
    def billed(self) -> dict[Any, int]:
        found: dict[Any, int] = {}
        for phase in self.door.ledger.phases:
            found[phase.event] = found.get(phase.event, 0) + phase.count
        return found


@pytest.fixture(params=["paper", "explicit"])
def door(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def first_of(run: Run, least: int = 3) -> Tensor:
    """Returns the first batch of the loader with enough examples, each from a pass of its own."""
    return next(x for x in (next(iter(run.loader))[0] for _ in itertools.count()) if len(x) >= least)


# -- rows that are not the examples ------------------------------------------------------------------------------------

OTHER_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "two views by cat": lambda x: torch.cat([x, x.flip(1)]),
    "crops flattened": lambda x: torch.stack([x, 2 * x, 3 * x], 1).flatten(0, 1),
    "windows": lambda x: x.repeat_interleave(4, 0),
    "sequence first": lambda x: torch.zeros(len(x) - 1, len(x), 3),
    "a slice": lambda x: x[:-1],
    "a mask": lambda x: x[torch.arange(len(x)) % 2 == 0],
    "one row more": lambda x: torch.cat([x, x[:1]]),
}


@pytest.mark.parametrize("what", OTHER_ROWS)
@pytest.mark.parametrize("partition", [False, True])
def test_rows_that_are_not_the_examples_are_refused_and_nothing_is_released(
    door: str, what: str, partition: bool
) -> None:
    run = Run(door, partition=partition)
    before = run.net.weight.detach().clone()
    x = first_of(run)
    rows = OTHER_ROWS[what](x)
    with pytest.raises(ProtocolError, match=rf"on {len(rows)} rows, .* a batch of {len(x)} examples.*flatten\(0, 1\)"):
        run.step(rows if rows.dim() == 2 else rows.sum(1))
    assert torch.equal(before, run.net.weight)
    assert run.billed == {}
    run.step(x)
    assert run.billed == {PartitionEvent(1, UNSAMPLED) if partition else SAMPLED: 1}, (
        "the batch may still be trained on"
    )


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_modes_that_show_gradients_refuse_them_too(mode: str) -> None:
    run = Run(mode=mode)
    x = first_of(run)
    run.net(torch.cat([x, x])).square().sum().backward()
    with pytest.raises(ProtocolError, match=f"on {2 * len(x)} rows"):
        run.optimizer.step()
    assert run.billed == {}
    assert all(p.grad is None for p in run.net.parameters())


def test_virtual_steps_refuse_them_too() -> None:
    for most in (3, 100):  # in several parts, and in one
        run = Run()
        with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=most, optimizer=run.optimizer) as parts:
            x = next(x for (x,) in parts if len(x))
            with pytest.raises(ProtocolError, match=rf"batch of {len(x)} examples|on {2 * len(x)} rows"):
                run.step(torch.cat([x, x]))
        assert run.billed == {}


def test_several_views_of_an_example_share_a_backward() -> None:
    """The way on that the refusal names: one row of the clipped sum is the gradient of all views of an example."""
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.door.mechanisms  # noqa: B018 - the same mechanism throughout
    seen = taken(run.net, run.optimizer)
    run.door._watched[0].update.noise.release = lambda clipped, **rest: SimpleNamespace(values=clipped.values, std=0.0)
    x = first_of(run)
    run.optimizer.zero_grad()
    (run.net(x).square().sum() + run.net(x.flip(1)).square().sum()).backward()
    run.optimizer.step()
    rows: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for row in x:
        twin = Net()
        twin.load_state_dict(run.net.state_dict())
        (twin(row).square().sum() + twin(row.flip(0)).square().sum()).backward()
        for name, p in twin.named_parameters():
            assert p.grad is not None
            rows[name].append(p.grad)
    assert_exact(seen[-1], expected_sum({name: torch.stack(all_of) for name, all_of in rows.items()}, Flat(1.0)))
    assert run.billed == {SAMPLED: 1}


def test_two_batches_in_one_backward_are_refused() -> None:
    run = Run(partition=True)
    batches = iter(run.loader)
    (x,), (y,) = next(batches), next(batches)
    run.net(x)
    with pytest.raises(ProtocolError, match="two batches of the private loader"):
        run.net(y)
    run.step(x)
    run.step(y)
    assert run.billed == {PartitionEvent(1, UNSAMPLED): 1}


def test_a_step_on_the_batch_before_never_joins_a_physical_batch() -> None:
    """A loop that steps at the head of the next turn would put an example of both batches into one sum."""
    run = Run()
    manager = BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer)

    def train() -> None:
        waits = False
        for (x,) in itertools.chain.from_iterable(parts for _ in range(20)):
            if waits:
                run.optimizer.step()
            run.net(x).square().sum().backward()
            waits = parts.last
            if not waits:
                run.optimizer.step()

    with manager as parts, pytest.raises(ProtocolError, match="of an earlier batch than the physical batch at hand"):
        train()


# -- batches read ahead ------------------------------------------------------------------------------------------------


def ahead(batches: Iterable[Any], k: int, change: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Yields the batches of a loader, of which `k` more are always fetched, as prefetchers do."""
    held: deque[Tensor] = deque()
    for (x,) in batches:
        held.append(x)
        if len(held) > k:
            yield change(held.popleft())
    while held:
        yield change(held.popleft())


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "the same tensors": lambda x: x,
    "views of them": lambda x: x.view(-1, 3)[:],
    "moved elsewhere": lambda x: x.clone(),
}


@pytest.mark.parametrize("k", [1, 2, 4, 10])
@pytest.mark.parametrize("change", CHANGES)
def test_batches_read_ahead_are_billed_once(door: str, k: int, change: str) -> None:
    run, passes = Run(door), 4
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(passes):
            for x in ahead(run.loader, k, CHANGES[change]):
                run.step(x)
    assert run.billed == {SAMPLED: 5 * passes}
    known = change != "moved elsewhere"
    assert {str(w.message).split(":")[0] for w in seen} <= (set() if known else {IN_DOUBT})
    assert set(run.door.ledger.marks) <= (set() if known else {"batches read ahead or left out"})


@pytest.mark.parametrize("partition", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_batches_read_ahead_over_the_end_of_a_pass_are_billed_once(door: str, change: str, partition: bool) -> None:
    run = Run(door, partition=partition)
    endless = itertools.chain.from_iterable(run.loader for _ in range(6))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=IN_DOUBT)
        for x in ahead(endless, 2, CHANGES[change]):
            run.step(x)
    assert run.billed == ({PartitionEvent(1, UNSAMPLED): 6} if partition else {SAMPLED: 30})


def test_at_every_step_the_bill_covers_what_was_released(door: str) -> None:
    for change in CHANGES.values():
        run = Run(door)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=IN_DOUBT)
            for done, x in enumerate(ahead(run.loader, 2, change), 1):
                run.step(x)
                assert done <= run.door.ledger.steps <= min(done + 2, 5)


def test_a_partition_read_ahead_is_in_doubt_and_billed_by_the_pass(door: str) -> None:
    run = Run(door, partition=True)
    with pytest.warns(UserWarning, match=IN_DOUBT):
        run.train(ahead(run.loader, 1, torch.clone))
    assert run.billed == {PartitionEvent(1, UNSAMPLED): 1}
    assert run.door.ledger.marks == ("batches read ahead or left out",)


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_left_out_is_billed_and_marked_whatever_tensors_are_trained_on(door: str, change: str) -> None:
    for without in range(4):
        run = Run(door)
        trained = (CHANGES[change](x) for place, (x,) in enumerate(run.loader) if place != without)
        with pytest.warns(UserWarning, match=f"{LEFT_OUT}|{IN_DOUBT}"):
            run.train(trained)
        assert run.billed == {SAMPLED: 5}
        assert run.door.ledger.marks


def test_a_list_of_all_batches_is_billed_once_and_its_second_epoch_as_not_sampled(door: str) -> None:
    run = Run(door)
    batches = [x for (x,) in run.loader]
    for x in batches:
        run.step(x)
    assert run.billed == {SAMPLED: 5}
    with pytest.warns(UserWarning, match="did not come"):
        run.train(batches)
    assert run.billed == {SAMPLED: 5, UNSAMPLED: 5}


def test_a_step_late_by_one_batch_is_the_step_of_its_own_batch() -> None:
    run = Run()
    before: Tensor | None = None
    for (x,) in run.loader:
        if before is not None:
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.net(x).square().sum().backward()
        before = x
    run.optimizer.step()
    assert run.billed == {SAMPLED: 5}


def test_a_change_of_the_noise_is_paid_by_the_batches_that_were_billed_ahead() -> None:
    run = Run(partition=False)
    queue = handed_over.HandedOver()
    run.door._watched[0].update.billing.handed_over = queue
    for index in range(2):
        queue.announce(BatchTicket(step=index, index=index, passes=1, size=8, sampling=Poisson(0.2)))
    billing, loud = run.door._watched[0].update.billing, run.door.mechanisms[0]
    with pytest.warns(UserWarning, match=IN_DOUBT):
        billing.begin(loud, queue.match(8, None))
    assert run.billed == {SAMPLED: 2}
    quiet = Mechanism(sampling=Poisson(0.2), clipping=Flat(1.0), noise=Gaussian(1.0))
    billing.begin(quiet, queue.match(8, None))
    assert run.billed == {SAMPLED: 2, PoissonEvent(0.2, GaussianEvent(1.0)): 1}


def test_batches_of_two_rates_that_cannot_be_told_apart_are_billed_as_not_sampled() -> None:
    queue = handed_over.HandedOver()
    for index, rate in enumerate((0.1, 0.2)):
        queue.announce(BatchTicket(step=index, index=index, passes=1, size=8, sampling=Poisson(rate)))
    assert queue.match(8, None) is None


def test_passes_that_are_only_looked_at_are_not_kept() -> None:
    run = Run()
    for _ in range(30):
        for _ in run.loader:
            pass
    queue = run.door._watched[0].update.billing.handed_over
    assert sum(map(len, queue._passes.values())) <= 5 * 8
    assert all(len(tickets) == 1 for tickets in queue._places.values())
    assert run.billed == {}


def test_these_tests_would_see_batches_matched_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ticket for every backward, whatever its rows, views pass for examples."""

    def careless(self: Any, examples: int, known: Any) -> Any:
        waiting = self.of_pass(self.current_pass)
        return handed_over.Match.certain(waiting[-1].ticket) if waiting else None

    monkeypatch.setattr(handed_over.HandedOver, "match", careless)
    run = Run()
    x = first_of(run)
    run.step(torch.cat([x, x]))
    assert run.billed == {SAMPLED: 1}


@pytest.mark.parametrize("k", [0, 1])
def test_a_second_step_on_a_batch_takes_no_other_batchs_ticket(door: str, k: int) -> None:
    run = Run(door)
    for _ in range(40):  # passes that were left, of which some batch has the size
        next(iter(run.loader))
    batches = list(ahead(run.loader, k, lambda x: x))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=LEFT_OUT)
        run.step(batches[-1])
    before = run.billed
    with pytest.warns(UserWarning, match="did not come"):
        run.step(batches[-1])
    assert run.billed == {**before, UNSAMPLED: 1}
    if len(batches[-1]):
        with pytest.raises(ProtocolError, match="a backward ran on"):
            run.step(batches[-1][:-1])
