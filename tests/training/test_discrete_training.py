"""Discrete noise in a run, at both doors: one example at a time, virtual steps, schedules, checkpoints, refusals."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from torch import nn

from privet import (
    Adaptive,
    BatchMemoryManager,
    ConfigurationError,
    DiscreteGaussian,
    Flat,
    Gaussian,
    Listed,
    Mechanism,
    Partition,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    Schedule,
)
from privet.accounting import DiscreteGaussianEvent, PartitionEvent, PoissonEvent
from privet.noise.discrete_draw import DiscreteDraw

N, B = 16, 8
WEIGHT = 3  # the last column of the data: of an example's loss
NOISE = DiscreteGaussian(1.0)


def drawn(seed: int) -> torch.Tensor:
    return torch.cat([torch.randn(N, 3, generator=torch.Generator().manual_seed(seed)), torch.ones(N, 1)], dim=1)


DATA = drawn(3)
EVENT = DiscreteGaussianEvent(1.0, 2.0**-10)
PARTITION = Partition(batch_size=B, dataset_size=N)
GRID = 2.0**-40


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return 5.0 * rows[:, WEIGHT] * model(rows[:, :WEIGHT]).square().sum(1)


def step_of(noise=NOISE, *, sampling=PARTITION, dtype=torch.float64, seed: int | None = 1, **options) -> PrivateStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    return PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=sampling, clipping=options.pop("clipping", Flat(1.0)), noise=noise, steps=2),
        loss_per_example=lambda model, batch: loss_of(model, batch[0].to(dtype)),
        noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
        **options,
    )


def batches(step: PrivateStep, data=DATA):
    return step.batches(torch.utils.data.TensorDataset(data))


def trained(step: PrivateStep, data=DATA, passes: int = 1) -> torch.Tensor:
    loader = batches(step, data)
    for _ in range(passes):
        for batch in loader:
            step(batch)
    return parameters(step)


def parameters(step: PrivateStep) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def releases(step: PrivateStep) -> list[torch.Tensor]:
    """Returns a list to which each release of a step is added, flat and not divided."""
    inner, found = step._update.noise, []

    class Watched:
        def release(self, clipped_sum, **options):
            names, released = list(clipped_sum.values), inner.release(clipped_sum, **options)
            found.append(torch.cat([released.values[name].flatten() for name in names]).double())
            return released

    step._update.noise = Watched()
    return found


def first_sum(step: PrivateStep, data=DATA) -> torch.Tensor:
    """Returns what the first step released, in steps of the grid."""
    found = releases(step)
    step(next(iter(batches(step, data))))
    return found[0] / GRID


def micro_batches(data: torch.Tensor) -> torch.Tensor:
    """Returns the clipped sum of the first batch by one example at a time, in float64."""
    model = step_of().model
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in data[:B].double():
        gradients = torch.autograd.grad(loss_of(model, row[None]).sum(), list(model.parameters()))
        flat = torch.cat([each.flatten() for each in gradients])
        total += flat * min(1.0, 1.0 / max(float(flat.norm()), 1e-30))
    return total


@pytest.fixture
def silent(monkeypatch):
    """Noise that is 0: what is left is the rounded sum. It stands for σ = 0, which a grid refuses."""
    monkeypatch.setattr(DiscreteDraw, "values", lambda self, law, count, **at: torch.zeros(count).long().numpy())


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rounded_sum_is_that_of_one_example_at_a_time(dtype):
    found = first_sum(step_of(dtype=dtype))
    if dtype == torch.float64:
        assert torch.equal(found, found.round())
    assert torch.allclose(found * GRID, micro_batches(DATA), atol=2.0**-40 if dtype == torch.float64 else 1e-5)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", ["gone", "a thousand times"])
def test_an_example_moves_the_rounded_sum_by_no_more_than_is_billed(dtype, change):
    # What the default sum_error allows is ten times and more of what float32 does here.
    shift = 0.0
    for seed in range(3):
        data = drawn(seed)
        other = data.clone()
        other[B - 1, WEIGHT:] *= 0.0 if change == "gone" else 1.0
        other[B - 1, :WEIGHT] *= 1.0 if change == "gone" else 1000.0
        one, two = first_sum(step_of(dtype=dtype), data), first_sum(step_of(dtype=dtype), other)
        exact = micro_batches(other) - micro_batches(data)
        arithmetic = float((two - one).mul(GRID).sub(exact).norm())
        assert arithmetic <= NOISE.sum_error / 10
        shift = max(shift, float((one - two).norm()))
    least = 2.0 if change == "a thousand times" else 1.0  # replaced, or zeroed out
    assert shift * GRID <= least / EVENT.gaussian_multiplier
    assert shift * GRID > 0.3  # and it is an example that matters


def test_what_ran_is_what_was_planned_and_billed():
    step = step_of()
    trained(step, passes=2)
    assert step.ledger.event() == PartitionEvent(2, EVENT) == step.mechanism.event()
    assert step.epsilon(1e-5) == step.mechanism.epsilon(1e-5) > step_of(Gaussian(1.0)).mechanism.epsilon(1e-5)
    poisson = step_of(sampling=Poisson(0.5))
    for batch in batches(poisson):
        poisson(batch)
    assert poisson.ledger.event().event == PoissonEvent(0.5, EVENT)
    assert "discrete" in json.dumps(poisson.ledger.event().to_dict())
    calibrated = step.mechanism.calibrated(epsilon=3.0, delta=1e-5)
    assert isinstance(calibrated.noise, DiscreteGaussian)
    assert 2.99 < calibrated.epsilon(1e-5) <= 3.0


def test_the_papers_door_takes_it_and_finds_its_multiplier():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    data = torch.utils.data.TensorDataset(DATA, torch.zeros(N, 1))
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=B),
        noise=NOISE,
        target_epsilon=4.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for x, y in loader:
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 3.9 < engine.get_epsilon(delta=1e-5) <= 4.0
    with pytest.raises(ConfigurationError, match="multiplier of DiscreteGaussian"):
        PrivacyEngine().make_private(
            module=nn.Linear(4, 1),
            optimizer=torch.optim.SGD(nn.Linear(4, 1).parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(data, batch_size=B),
            noise=NOISE,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
        )


def test_physical_batches_release_what_one_piece_releases():
    parts = step_of(performance=Performance(physical_batch_size=3))
    assert torch.allclose(trained(parts), trained(step_of()), atol=1e-10)
    found = []
    for most in (N, 3):
        torch.manual_seed(0)
        model = nn.Linear(4, 1).double()
        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA.double()), batch_size=B),
            sampling=PARTITION,
            noise=NOISE,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            noise_generator=torch.Generator().manual_seed(1),
        )
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=most, optimizer=optimizer) as parts:
            for (x,) in parts:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert engine.ledger.event() == PartitionEvent(1, EVENT)
    assert torch.allclose(*found, atol=1e-10)


def test_a_schedule_of_noise_and_clip_norm_is_billed_and_followed():
    step = step_of(sampling=Poisson(0.5))
    loader, found = batches(step), releases(step)
    courses = Schedule(step._update.optimizer, noise=Listed((1.0, 2.0)), clip_norm=Listed((1.0, 1.0, 0.3)))
    for size in (1.0, 2.0, 0.6):
        for batch in loader:
            step(batch)
            spacing = 2.0 ** (math.floor(math.log2(size)) - 40)
            assert torch.equal(found[-1] / spacing, (found[-1] / spacing).round())
        courses.step()
    assert [phase.event.event.noise_multiplier for phase in step.ledger.phases] == [1.0, 2.0]
    with pytest.raises(ConfigurationError, match="cannot become"):
        step._update.mechanism = Mechanism(sampling=Poisson(0.5), clipping=Flat(1.0), noise=Gaussian(1.0), steps=2)


@pytest.mark.parametrize("seed", [1, None])
def test_a_resumed_run_has_a_fresh_key_unless_it_is_reproducible(seed):
    first = step_of(seed=seed)
    loader = batches(first)
    for batch in loader:
        first(batch)
    saved = io.BytesIO()
    first.save_checkpoint(saved)
    again = step_of(seed=seed)
    saved.seek(0)
    again.load_checkpoint(saved)
    assert torch.equal(parameters(first), parameters(again))
    for batch in loader:
        first(batch)
    for batch in batches(again):
        again(batch)
    assert torch.allclose(parameters(first), parameters(again)) == (seed is not None)
    assert again.ledger.event() == PartitionEvent(2, EVENT)


def test_a_sum_that_the_grid_cannot_hold_stops_the_step_and_is_billed():
    step = step_of(DiscreteGaussian(2.0**-10), clipping=Flat(1.0))
    before = parameters(step)
    batch = next(iter(batches(step)))
    inner = step._update.noise

    class Huge:
        def release(self, clipped_sum, **options):
            for value in clipped_sum.values.values():
                value.fill_(2.0**12)
            return inner.release(clipped_sum, **options)

    step._update.noise = Huge()
    with pytest.raises(ProtocolError, match="grid cannot hold"):
        step(batch)
    assert torch.equal(parameters(step), before)
    assert all(p.grad is None for p in step.model.parameters())
    assert step.ledger.event() == PartitionEvent(1, DiscreteGaussianEvent(2.0**-10, 2.0**-10))


def test_adaptive_clipping_is_refused_with_it():
    with pytest.raises(ConfigurationError, match="Expected Gaussian noise"):
        Mechanism(sampling=PARTITION, clipping=Adaptive(1.0, count_noise=2.0), noise=NOISE, steps=1)
