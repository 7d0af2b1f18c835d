"""Virtual steps by both doors: the sum, the noise, the ledger and the optimizer are those of the logical batch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, LRScheduler, SequentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    OutOfMemoryError,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
)
from privet.accounting.event import GaussianEvent, PoissonEvent
from privet.gradients.clipped_sum import ClippedSum
from privet.noise import SecureNoise
from privet.sampling import BatchTicket
from privet.schedules import Exponential, Schedule
from privet.training.logical_sum import LogicalSum
from privet.training.update import update_of
from tests.contracts.doors import Expected, assert_exact, reference, taken
from tests.contracts.doors import size as size_of

torch.set_num_threads(1)
N, STEPS = 40, 4  # examples, and logical steps in a pass
CLIP = 0.3


class Net(nn.Module):
    """Fits into memory up to a number of rows, which may change while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.last = nn.Linear(4, 3)
        self.fits = 10**9
        self.drops_at: int | None = None  # after so many forwards, a quarter of it fits
        self.rows: list[int] = []  # of the training forwards that succeeded
        self.error: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def forward(self, x: Tensor) -> Tensor:
        if self.drops_at is not None and len(self.rows) >= self.drops_at:
            self.fits, self.drops_at = self.fits // 4, None
        if len(x) > self.fits:
            raise self.error
        self.rows.append(len(x))
        return self.last(torch.tanh(self.first(x)))


def entropy(net: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:  # (B,)
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


class Run:
    """A private run, what its optimizer saw, and what its noise was asked for."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, sigma: float = 1.0, batch_size: int = 10, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.data = TensorDataset(torch.randn(N, 5), torch.randint(0, 3, (N,)))
        self.net = Net()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.engine = PrivacyEngine(accountant="rdp")
        _, _, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=self.optimizer,
            data_loader=DataLoader(self.data, batch_size=batch_size, num_workers=options.pop("num_workers", 0)),
            noise_multiplier=sigma,
            max_grad_norm=CLIP,
            noise_generator=torch.Generator().manual_seed(3),
            **options,
        )
        self.reduction = options.get("loss_reduction", "mean")
        self.divisor = batch_size if self.reduction == "mean" else 1
        self.seen = taken(self.net, self.optimizer)
        self.drawn: list[tuple[int, float]] = []
        whole, own = SecureNoise.add_many, update_of(self.optimizer).noise.source

        def add_many(source: Any, tensors: Any, *, std: float, step: int, offsets: Any = None) -> None:
            if source is own:
                self.drawn.append((step, std))
            whole(source, tensors, std=std, step=step, offsets=offsets)

        monkeypatch.setattr(SecureNoise, "add_many", add_many)

    def body(self, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        self.optimizer.zero_grad()
        (scale * F.cross_entropy(self.net(x), y, reduction=self.reduction)).backward()
        self.optimizer.step()

    def manager(self, size: Any, **options: Any) -> BatchMemoryManager:
        return BatchMemoryManager(
            data_loader=self.loader, max_physical_batch_size=size, optimizer=self.optimizer, **options
        )

    def trained(self, size: Any = None, *, scale: float = 1.0) -> Run:
        if size is None:
            for x, y in self.loader:
                self.body(x, y, scale)
        else:
            with self.manager(size) as parts:
                for x, y in parts:
                    with parts.attempt():
                        self.body(x, y, scale)
        return self

    def state(self) -> list[Tensor]:
        return [t.clone() for t in self.net.state_dict().values()]


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    return lambda **options: Run(monkeypatch, **options)


def assert_same_run(found: Run, expected: Run) -> None:
    assert found.drawn == expected.drawn
    assert found.engine.ledger.phases == expected.engine.ledger.phases
    assert len(found.seen) == len(expected.seen)
    for ours, theirs in zip(found.seen, expected.seen, strict=True):
        most = CLIP * N / expected.divisor  # the terms of the sum: everybody's gradient, clipped
        assert_exact(ours, Expected(theirs, terms=most + size_of(theirs)), tolerance=1e-5)  # and the noise
    # A state of the optimizer that counts steps counts logical ones.
    (steps,) = {int(state["step"]) for state in found.optimizer.state.values()}
    assert steps == len(expected.drawn)


# -- the paper's door --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7, 1000, "auto"])
def test_physical_batches_change_nothing(new: Callable[..., Run], size: Any, poisson: bool, reduction: str) -> None:
    expected = new(poisson_sampling=poisson, loss_reduction=reduction).trained()
    found = new(poisson_sampling=poisson, loss_reduction=reduction).trained(size)
    assert_same_run(found, expected)
    assert len(expected.drawn) == STEPS
    if isinstance(size, int):
        trained = found.net.rows[-2:]  # the first forwards belong to the check
        assert max(trained) <= size


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_physical_batches_change_nothing_in_modes_that_show_gradients(new: Callable[..., Run], mode: str) -> None:
    assert_same_run(new(grad_sample_mode=mode).trained(3), new().trained())


def test_the_sum_of_a_mean_is_scaled_by_the_physical_batch(new: Callable[..., Run]) -> None:
    """Without clipping in effect, sizes that do not divide the batch would show any other scale."""
    runs = []
    for most in (None, 7):
        run = new(sigma=0.0)
        update = update_of(run.optimizer)
        update.mechanism = Mechanism(sampling=update.mechanism.sampling, clipping=Flat(1e4), noise=Gaussian(0.0))
        plain = Net()
        plain.load_state_dict(run.net.state_dict())
        everybody = reference(plain, run.data.tensors, entropy, Flat(1e4)).terms
        runs.append(run.trained(most))
    for ours, theirs in zip(runs[0].seen, runs[1].seen, strict=True):
        assert_exact(ours, Expected(theirs, terms=everybody / run.divisor), tolerance=1e-5)


def test_noise_is_bit_equal(new: Callable[..., Run]) -> None:
    """Where every gradient is zero, what the optimizer sees is the noise."""
    expected = new().trained(scale=0.0)
    for size in (1, 3, 7, 1000):
        found = new().trained(size, scale=0.0)
        for ours, theirs in zip(found.seen, expected.seen, strict=True):
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert float(expected.seen[0]["first.weight"].abs().max()) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_every_example_comes_once_and_in_order(new: Callable[..., Run], workers: int) -> None:
    run, twin = new(), new(num_workers=workers)
    logical = [x for x, _ in run.loader]
    parts: list[list[Tensor]] = [[]]
    with twin.manager(3) as loader:
        for x, y in loader:
            twin.body(x, y)
            parts[-1].append(x)
            if loader.last:
                parts.append([])
    assert parts.pop() == []
    assert all(len(x) <= 3 for part in parts for x in part)
    assert all(torch.equal(torch.cat(part), x) for part, x in zip(parts, logical, strict=True))


def test_only_the_last_physical_batch_does_anything(new: Callable[..., Run]) -> None:
    run = new()
    before, done = run.state(), 0
    with run.manager(2) as parts:
        for x, y in parts:
            run.optimizer.zero_grad()
            loss = F.cross_entropy(run.net(x), y)
            loss.backward()
            with pytest.raises(ProtocolError, match="between backward and step"):
                run.optimizer.zero_grad()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.optimizer.zero_grad(set_to_none=False)
            assert all(p.grad is None or not p.grad.any() for p in run.net.parameters())
            done += 1
            if not parts.last:
                assert run.engine.ledger.steps == len(run.drawn) == 0
                assert all(torch.equal(a, b) for a, b in zip(before, run.state(), strict=True))
            else:
                break
    assert done > 1
    assert run.engine.ledger.steps == len(run.drawn) == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, run.state(), strict=True))


def test_closures_take_virtual_steps(new: Callable[..., Run]) -> None:
    run = new()
    with run.manager(3) as parts:
        for x, y in parts:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                run.optimizer.zero_grad()
                loss = F.cross_entropy(run.net(x), y)
                loss.backward()
                return loss

            assert run.optimizer.step(closure) is not None
    assert_same_run(run, new().trained())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: ExponentialLR(o, 0.5),
        lambda o: StepLR(o, 2, 0.1),
        lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o: SequentialLR(o, [ExponentialLR(o, 0.5), StepLR(o, 1, 0.1)], milestones=[2]),
    ],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # of torch's own SequentialLR
@pytest.mark.parametrize("inside", [True, False])
def test_learning_rates_count_logical_steps(
    new: Callable[..., Run], make: Callable[[torch.optim.Optimizer], LRScheduler], inside: bool
) -> None:
    run, twin = new(), new()
    scheduler = make(twin.optimizer)
    for x, y in twin.loader:
        twin.body(x, y)
        scheduler.step()
    expected = scheduler.get_last_lr(), scheduler.last_epoch
    outer = None if inside else make(run.optimizer)
    with run.manager(2) as parts:
        scheduler = outer or make(run.optimizer)
        for x, y in parts:
            run.body(x, y)
            scheduler.step()
    assert (scheduler.get_last_lr(), scheduler.last_epoch) == expected
    assert_same_run(run, twin)


def test_lengths_and_progress_count_logical_steps(new: Callable[..., Run]) -> None:
    run, shown = new(), []

    def bar(steps: Any) -> Iterator[int]:
        for step in steps:
            shown.append(("begun", step, len(steps)))
            yield step
            shown.append(("done", step, run.engine.ledger.steps))
        shown.append(("closed", len(steps), run.engine.ledger.steps))

    with run.manager(2, progress=bar) as parts:
        assert len(parts) == len(run.loader) == STEPS
        assert (len(parts.dataset), parts.batch_size, parts.physical_batch_size) == (N, 10, 2)
        for x, y in parts:
            run.body(x, y)
    assert [s for s in shown if s[0] == "done"] == [("done", t, t + 1) for t in range(STEPS)]
    assert shown[-1] == ("closed", STEPS, STEPS)


# -- nothing is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["break", "exception in the loop", "exception before the step", "break, held iterator"])
def test_what_is_left_unfinished_leaves_nothing(new: Callable[..., Run], how: str) -> None:
    run = new(batch_size=20)
    original = run.optimizer.step
    before = run.state()

    class StopError(Exception):
        pass

    def left() -> None:
        with run.manager(3) as parts:
            batches = iter(parts)
            for place, (x, y) in enumerate(batches):
                if how == "exception before the step" and place == 1:
                    F.cross_entropy(run.net(x), y).backward()
                    raise StopError
                run.body(x, y)
                if place == 1:
                    if how == "exception in the loop":
                        raise StopError
                    break
            if how == "break":
                del batches
                gc.collect()
                assert not update_of(run.optimizer).pending

    if how.startswith("exception"):
        with pytest.raises(StopError):
            left()
    else:
        left()
    assert run.optimizer.step == original
    assert run.engine.ledger.steps == len(run.drawn) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.state(), strict=True))
    assert not update_of(run.optimizer).unfinished
    with pytest.raises(ProtocolError, match="no backward since the last step"):
        run.optimizer.step()
    # The next pass is as good as any, and its sum has nothing of the one before.
    twin = new(batch_size=20)
    next(iter(twin.loader))
    run.drawn.clear()
    assert_same_run(run.trained(3), twin.trained())


def test_an_empty_logical_batch_is_one_step(new: Callable[..., Run]) -> None:
    run, twin = new(batch_size=1), new(batch_size=1)
    sizes = []
    with run.manager(1) as parts:
        for x, y in parts:
            run.optimizer.zero_grad()
            F.cross_entropy(run.net(x), y, reduction="none").sum().div(max(len(y), 1)).backward()
            run.optimizer.step()
            sizes.append(len(x))
    assert 0 in sizes
    assert run.engine.ledger.steps == len(run.drawn) == N
    for x, y in twin.loader:
        twin.optimizer.zero_grad()
        F.cross_entropy(twin.net(x), y, reduction="none").sum().div(max(len(y), 1)).backward()
        twin.optimizer.step()
    assert run.drawn == twin.drawn


def part_of(value: float) -> ClippedSum:
    return ClippedSum({"p": torch.full((2,), value)}, sensitivity=1.0)


def test_a_logical_batch_that_was_given_up_is_in_no_other_sum() -> None:
    """Whoever forgot to forget it: the first part of another logical batch begins anew."""
    gathered = LogicalSum()
    for index, values in enumerate([[1.0], [10.0, 100.0]]):
        for place, value in enumerate(values):
            gathered.announce(
                BatchTicket(step=index, index=index, passes=1, size=4, first=place == 0, last=value == 100.0)
            )
            gathered.receive(part_of(value), examples=4, match=None)
            if value != 100.0:
                gathered.accumulate()
    gathered.require()
    assert gathered.match() is not None
    assert gathered.take().values["p"].tolist() == [110.0, 110.0]
    assert not gathered.begun


def test_a_logical_batch_that_begins_in_the_middle_is_not_called_whole() -> None:
    gathered = LogicalSum()
    gathered.announce(BatchTicket(step=0, index=0, passes=1, size=4, first=False, last=True))
    gathered.receive(part_of(1.0), examples=4, match=None)
    assert gathered.match() is None


# -- calls out of order ------------------------------------------------------------------------------------------------


def test_an_example_is_in_a_sum_once(new: Callable[..., Run]) -> None:
    run = new()
    with run.manager(2) as parts:
        x, y = next(iter_ := iter(parts))
        run.body(x, y)
        with pytest.raises(ProtocolError, match="could be in the sum twice"):
            run.body(x, y)
        x, y = next(iter_)
        with pytest.raises(ProtocolError, match="could be in the sum twice"):
            run.body(torch.cat([x, x]), torch.cat([y, y]))
    assert run.engine.ledger.steps == 0


def test_a_part_that_was_skipped_costs_the_amplification(new: Callable[..., Run]) -> None:
    run = new()
    with run.manager(2) as parts:
        for place, (x, y) in enumerate(parts):
            if place == 1:
                continue
            if parts.last:
                with pytest.warns(UserWarning, match="whole and fresh"):
                    run.body(x, y)
                break
            run.body(x, y)
    assert [p.event for p in run.engine.ledger.phases] == [GaussianEvent(1.0)]


def test_a_step_that_the_manager_does_not_see_is_refused(new: Callable[..., Run]) -> None:
    run = new()
    behind = run.optimizer.step
    with run.manager(2) as parts:
        x, y = next(iter(held := iter(parts)))
        F.cross_entropy(run.net(x), y).backward()
        with pytest.raises(ProtocolError, match="still to come"):
            behind()
        held.close()
    assert run.engine.ledger.steps == 0


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "all"])
def test_a_bad_size_is_refused(new: Callable[..., Run], size: Any) -> None:
    run = new()
    with pytest.raises(ConfigurationError, match="max_physical_batch_size must be a whole number of at least 1"):
        run.manager(size)
    if size is not None:
        with pytest.raises(ConfigurationError, match="physical_batch_size must be a whole number of at least 1"):
            explicit(size)


def test_others_loaders_and_optimizers_are_refused(new: Callable[..., Run]) -> None:
    run, other = new(), new()
    stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    for data_loader, optimizer in (
        (run.loader, stranger),
        (other.loader, run.optimizer),
        (DataLoader(run.data), run.optimizer),
    ):
        with pytest.raises(ConfigurationError, match="is not the"):
            BatchMemoryManager(data_loader=data_loader, max_physical_batch_size=2, optimizer=optimizer)
    with run.manager(2), pytest.raises(ProtocolError, match="already"), run.manager(2):
        pass


def test_a_rate_schedule_with_workers_and_physical_batches_is_refused(new: Callable[..., Run]) -> None:
    run = new(num_workers=1)
    Schedule(run.optimizer, rate=Exponential(0.5))
    with run.manager(2) as parts, pytest.raises(ConfigurationError, match="which are secret"):
        iter(parts)


# -- out of memory -----------------------------------------------------------------------------------------------------

ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried ..."
    ),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("moment", "workers"),
    [
        ("start", 0),
        ("mid-run", 0),
        ("mid-batch", 2),
        *(pytest.param(*pair, marks=pytest.mark.deep) for pair in [("start", 2), ("mid-run", 2), ("mid-batch", 0)]),
    ],
)
def test_the_largest_size_that_fits_is_found_by_halving(
    new: Callable[..., Run], moment: str, error: str, workers: int
) -> None:
    expected, found = new().trained(), new(num_workers=workers)
    found.net.error = ERRORS[error]
    if moment == "start":
        found.net.fits = 3
    with found.manager("auto") as parts:
        place = {"start": -1, "mid-run": 2, "mid-batch": 3}[moment]
        for count, (x, y) in enumerate(parts):
            if moment == "mid-batch" and count == 1:
                found.net.fits = 6  # the second logical batch is cut, and then fails in its last part
            if count == place:
                found.net.fits = 2
            with parts.attempt():
                found.body(x, y)
        assert parts.physical_batch_size is not None
        assert 1 <= parts.physical_batch_size <= found.net.fits < 2 * parts.physical_batch_size + 2
    assert_same_run(found, expected)


def test_memory_that_runs_out_in_the_backward_is_cured_as_well(new: Callable[..., Run]) -> None:
    expected, found = new().trained(), new()
    with found.manager("auto") as parts:
        for x, y in parts:
            with parts.attempt():
                found.optimizer.zero_grad()
                loss = F.cross_entropy(found.net(x), y)
                if len(x) > 4:
                    raise torch.OutOfMemoryError("in the loss")
                loss.backward()
                if len(x) > 2:
                    raise torch.OutOfMemoryError("after the backward")
                found.optimizer.step()
    assert_same_run(found, expected)


def test_memory_that_runs_out_after_the_step_is_not_tried_again(new: Callable[..., Run]) -> None:
    run = new()
    with pytest.raises(torch.OutOfMemoryError), run.manager("auto") as parts:  # noqa: PT012
        for x, y in parts:
            with parts.attempt():
                run.body(x, y)
                raise torch.OutOfMemoryError("later")
    assert run.engine.ledger.steps == len(run.drawn) == 1


def test_what_no_halving_cures_is_one_error_with_the_sizes(new: Callable[..., Run]) -> None:
    run = new(poisson_sampling=False)
    run.net.fits = 0
    with pytest.raises(OutOfMemoryError, match="after 10, 5, 2, 1 were tried"):
        run.trained("auto")
    assert run.engine.ledger.steps == len(run.drawn) == 0
    assert not update_of(run.optimizer).unfinished


def test_without_an_attempt_the_error_says_what_to_do(new: Callable[..., Run]) -> None:
    run = new()
    run.net.fits = 2
    with pytest.raises(torch.OutOfMemoryError) as caught, run.manager("auto") as parts:  # noqa: PT012
        for x, y in parts:
            run.body(x, y)
    assert "loader.attempt()" in caught.value.__notes__[0]
    given = new()
    given.net.fits = 2
    with pytest.raises(torch.OutOfMemoryError):
        given.trained(3)


def test_another_error_in_an_attempt_is_the_users(new: Callable[..., Run]) -> None:
    run = new()
    with pytest.raises(KeyError), run.manager("auto") as parts:  # noqa: PT012
        for _ in parts:
            with parts.attempt():
                raise KeyError
    assert run.engine.ledger.steps == 0


# -- the explicit door -------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    x: Tensor
    y: Tensor
    names: list[str]
    weight: Tensor


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tensor": (lambda x, y: x, lambda b: (b, (b.sum(1) > 0).long())),
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, [y]], lambda b: (b[0], b[1][0])),
    "dict": (lambda x, y: {"x": x, "more": {"y": y, "count": 3}}, lambda b: (b["x"], b["more"]["y"])),
    "namedtuple": (
        lambda x, y: Named(x, y, [str(i) for i in range(len(x))], torch.tensor(1.0)),
        lambda b: (b.x * b.weight, b.y),
    ),
}


def explicit(
    size: Any,
    *,
    form: str = "tuple",
    sigma: float = 0.0,
    passes: Any = 1,
    fits: int = 10**9,
    failing_after: int | None = None,
) -> tuple[PrivateStep, Net, list[dict[str, Tensor]], list[Tensor]]:
    """Returns step, model, the gradients of three steps on batches of 20, and their losses."""
    torch.manual_seed(0)
    net = Net()
    net.fits = fits
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    made, taken_apart = FORMS[form]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = taken_apart(batch)
        return F.cross_entropy(model(x), y, reduction="none")

    step = PrivateStep(
        net,
        optimizer=optimizer,
        mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(CLIP), noise=Gaussian(sigma)),
        loss_per_example=loss,
        expected_batch_size=20,
        performance=Performance(passes=passes, physical_batch_size=size),
        noise_generator=torch.Generator().manual_seed(5),
    )
    seen, losses = taken(net, optimizer), []
    for _ in range(3):
        x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
        batch = made(x, y)
        step._update.announce(TICKET)
        if len(losses) == 1 and failing_after is not None:
            net.drops_at = len(net.rows) + failing_after
        losses.append(step(batch))
    return step, net, seen, losses


TICKET = BatchTicket(step=0, index=0, passes=1, size=20)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 3, 7, 20, 1000, "auto"])
def test_a_step_splits_its_batch(size: Any, form: str, passes: int) -> None:
    step, net, seen, losses = explicit(size, form=form, passes=passes)
    _, _, expected, whole = explicit(None, form=form)
    for ours, theirs in zip(seen, expected, strict=True):
        assert_exact(ours, Expected(theirs, terms=CLIP), tolerance=1e-5)  # the mean of 20 that were clipped
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(losses, whole, strict=True))
    assert [(p.event, p.count) for p in step.ledger.phases] == [(PoissonEvent(0.5, GaussianEvent(0.0)), 3)]
    if isinstance(size, int):
        assert max(net.rows[-3:]) <= size


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_finds_the_size_that_fits(passes: int) -> None:
    step, net, seen, _ = explicit("auto", fits=6, passes=passes)
    _, _, expected, _ = explicit(None)
    assert step._size.tried == [20, 10]
    assert step._size.most == 5
    for ours, theirs in zip(seen, expected, strict=True):
        assert_exact(ours, Expected(theirs, terms=CLIP), tolerance=1e-5)  # the mean of 20 that were clipped
    net.fits = 3  # in mid-run, with a part of the batch summed already
    rows = len(net.rows)
    step._update.announce(TICKET)
    assert len(step((torch.randn(20, 5), torch.randint(0, 3, (20,))))) == 20
    assert sum(net.rows[rows:]) >= 20
    assert step.ledger.steps == 4


@pytest.mark.parametrize("passes", [1, 2])
def test_a_part_that_fails_in_mid_batch_neither_loses_nor_repeats_an_example(passes: int) -> None:
    step, _, seen, losses = explicit("auto", fits=10, passes=passes)
    _, _, expected, whole = explicit(None)
    step_, _, seen_, losses_ = explicit("auto", fits=10, passes=passes, failing_after=2)
    assert step._size.most < 20 > step_._size.most
    assert step_._size.most < step._size.most, "it failed once more, with a part of the batch summed already"
    for found in (seen, seen_):
        for ours, theirs in zip(found, expected, strict=True):
            assert_exact(ours, Expected(theirs, terms=CLIP), tolerance=1e-5)  # the mean of 20 that were clipped
    for found in (losses, losses_):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, whole, strict=True))


def test_noise_of_a_split_step_is_bit_equal() -> None:
    class Zero(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.0

    grads = []
    for size in (None, 1, 3, 7, "auto"):
        torch.manual_seed(0)
        net = Zero()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        step = PrivateStep(
            net,
            optimizer=optimizer,
            mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(CLIP), noise=Gaussian(1.0)),
            loss_per_example=lambda m, b: m(b).sum(1),
            expected_batch_size=20,
            performance=Performance(physical_batch_size=size),
            noise_generator=torch.Generator().manual_seed(5),
        )
        seen = taken(net, optimizer)
        step._update.announce(TICKET)
        step(torch.randn(20, 5))
        grads.append(seen[0])
    assert all(torch.equal(g[n], grads[0][n]) for g in grads for n in g)
    assert float(grads[0]["first.weight"].abs().max()) > 0


def test_a_step_that_no_halving_cures_was_not_taken() -> None:
    with pytest.raises(OutOfMemoryError, match="after 20, 10, 5, 2, 1 were tried"):
        explicit("auto", fits=0)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.randn(4, 5), torch.randn(3)),
        {"x": torch.randn(4, 5), "names": ["a", "b"]},
        [torch.randn(4, 5), torch.randn(1, 4)],
    ],
)
def test_what_cannot_be_cut_is_refused(batch: Any) -> None:
    net = nn.Linear(5, 2)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.5), clipping=Flat(CLIP), noise=Gaussian(1.0)),
        loss_per_example=lambda m, b: m(b[0] if isinstance(b, tuple | list) else b["x"]).sum(1),
        expected_batch_size=4,
        performance=Performance(physical_batch_size=2),
    )
    with pytest.raises(ConfigurationError, match="cut into physical ones"):
        step(batch)
    assert step.ledger.steps == 0
