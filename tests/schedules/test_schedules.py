"""Schedules: planned before, billed as run, changed between logical steps only; a number out of range stops a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    BatchMemoryManager,
    BudgetExceededError,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    PerLayer,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
)
from privet.accounting.budget import Budget
from privet.accounting.event import GaussianEvent, PartitionEvent, PoissonEvent
from privet.schedules import Course, Exponential, Listed, Plan, Schedule, Stepwise
from privet.training.update import update_of
from tests.contracts.doors import taken

torch.set_num_threads(1)
BASE = Mechanism(sampling=Poisson(0.2), clipping=Flat(0.5), noise=Gaussian(2.0), steps=6)


def private(*, poisson: bool = True, sigma: float = 2.0, clip: float = 0.5, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    data = DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8)
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=sigma,
        max_grad_norm=clip,
        poisson_sampling=poisson,
        noise_generator=torch.Generator().manual_seed(1),
        **options,
    )
    return engine, model, optimizer, loader


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum(1).mean().backward()
    optimizer.step()


# -- courses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("course", "factors"),
    [
        (Exponential(0.5), [1.0, 0.5, 0.25, 0.125]),
        (Stepwise(2, 0.5), [1.0, 1.0, 0.5, 0.5]),
        (lambda t: 1.0 + t, [1.0, 2.0, 3.0, 4.0]),
        (Listed((3.0, 2.0)), [3.0, 2.0, 2.0, 2.0]),
    ],
)
def test_courses_are_what_they_say(course: Course, factors: list[float]) -> None:
    assert [course(t) for t in range(4)] == factors


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exponential(0.0),
        lambda: Exponential(-1.0),
        lambda: Exponential(math.nan),
        lambda: Stepwise(0, 0.5),
        lambda: Stepwise(1.5, 0.5),
        lambda: Plan(BASE, rate="half"),
        lambda: Listed(()),
        lambda: Listed((1.0, 0.0)),
        lambda: Listed("12"),
        lambda: Plan(BASE, noise=0.5),
        lambda: Plan(BASE, noise=Exponential(0.9), every=0),
        lambda: Plan("mechanism"),
    ],
)
def test_a_bad_description_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_without_change_costs_what_its_mechanism_does() -> None:
    assert Plan(BASE).event() == BASE.event()
    assert Plan(BASE, noise=Listed((1.0,))).event() == BASE.event()
    assert Plan(BASE, clip_norm=Exponential(0.5)).event() == BASE.event()


def test_a_plan_is_composed_of_its_phases() -> None:
    plan = Plan(BASE, noise=Exponential(0.5), rate=Listed((1.0, 2.0)), every=4)
    found = [(phase.event, phase.count) for phase in plan.phases()]
    assert found == [(PoissonEvent(0.2, GaussianEvent(2.0)), 4), (PoissonEvent(0.4, GaussianEvent(1.0)), 2)]
    assert plan.epsilon(1e-5, accountant="rdp") > BASE.epsilon(1e-5, accountant="rdp")


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_a_plan_is_calibrated_as_a_whole(accountant: str) -> None:
    plan = Plan(BASE, noise=Stepwise(2, 0.8), rate=Listed((1.0, 0.5)))
    fitted = plan.calibrated(epsilon=1.0, delta=1e-5, accountant=accountant)
    assert 0.999 <= fitted.epsilon(1e-5, accountant=accountant) <= 1.0
    ratios = [fitted.at(t).noise.multiplier / plan.at(t).noise.multiplier for t in range(6)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-12)
    assert (fitted.noise, fitted.rate) == (plan.noise, plan.rate)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None])
@pytest.mark.parametrize("what", ["noise", "clip_norm", "rate"])
def test_a_plan_with_a_number_out_of_range_has_no_price(what: str, value: Any) -> None:
    plan = Plan(BASE, **{what: lambda t: value if t == 3 else 1.0})
    with pytest.raises(ConfigurationError, match="schedule step 3"):
        plan.epsilon(1e-5)


def test_a_rate_above_one_and_the_rate_of_a_partition_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\[0, 1\]"):
        Plan(BASE, rate=Listed((1.0, 6.0))).event()
    _, _, optimizer, _ = private(poisson=False)
    with pytest.raises(ConfigurationError, match="has no rate"):
        Schedule(optimizer, rate=Exponential(0.5))


def test_every_clip_norm_of_a_policy_follows() -> None:
    plan = Plan(
        Mechanism(sampling=Poisson(0.2), clipping=PerLayer({"a": 1.0, "b": 2.0}), noise=Gaussian(1.0)),
        clip_norm=Exponential(0.5),
    )
    assert plan.at(1).clipping == PerLayer({"a": 0.5, "b": 1.0})


# -- runs --------------------------------------------------------------------------------------------------------------

NOISE = {
    "exponential": lambda o: Schedule(o, noise=Exponential(0.5)),
    "step": lambda o: Schedule(o, noise=Stepwise(2, 0.5)),
    "lambda": lambda o: Schedule(o, noise=lambda t: 1.0 / (1 + t)),
    "list": lambda o: Schedule(o, noise=Listed([1.0, 0.9, 0.7])),
}
CLIP = {
    "exponential": lambda o: Schedule(o, clip_norm=Exponential(0.5)),
    "step": lambda o: Schedule(o, clip_norm=Stepwise(2, 0.5)),
    "lambda": lambda o: Schedule(o, clip_norm=lambda t: 1.0 / (1 + t)),
    "list": lambda o: Schedule(o, clip_norm=Listed([1.0, 0.9, 0.7])),
}
RATE = {
    "exponential": lambda o: Schedule(o, rate=Exponential(0.5)),
    "step": lambda o: Schedule(o, rate=Stepwise(2, 0.5)),
    "lambda": lambda o: Schedule(o, rate=lambda t: 1.0 + t / 2),
    "list": lambda o: Schedule(o, rate=Listed([1.0, 2.0, 0.5])),
}


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("what", [NOISE, CLIP, RATE], ids=["noise", "clip norm", "rate"])
def test_a_run_costs_what_its_plan_said(what: dict[str, Any], kind: str) -> None:
    engine, model, optimizer, loader = private()
    schedule = what[kind](optimizer)
    plan = schedule.plan(5)
    sensitivities = []
    for (x,) in loader:
        sensitivities.append(engine.mechanisms[0].clipping.sensitivity)
        trained(model, optimizer, x)
        schedule.step()
    assert engine.ledger.phases == plan.phases()
    assert engine.get_epsilon(1e-5) == plan.epsilon(1e-5, accountant="rdp")
    assert sensitivities == [plan.at(t).clipping.sensitivity for t in range(5)]
    assert schedule.steps == 5
    assert len(engine.ledger.phases) > 1 or what is CLIP


@pytest.mark.parametrize("what", ["noise", "clip"])
def test_noise_and_clipping_are_as_scheduled(what: str) -> None:
    """A gradient of zero shows the noise; one far above the clip norm, without noise, shows the clip norm."""
    _, model, optimizer, loader = private(sigma=2.0 if what == "noise" else 0.0, loss_reduction="sum")
    seen, sizes = taken(model, optimizer), []
    schedule = (
        Schedule(optimizer, noise=Exponential(0.01))
        if what == "noise"
        else Schedule(optimizer, clip_norm=Exponential(0.01))
    )
    for (x,) in loader:
        optimizer.zero_grad()
        (model(x) * (0.0 if what == "noise" else 1e3)).sum().backward()
        optimizer.step()
        sizes.append(len(x))
        schedule.step()
    for t, (grads, size) in enumerate(zip(seen, sizes, strict=True)):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        scale = 0.5 * 0.01**t * (2.0 * math.sqrt(8) if what == "noise" else size)
        assert 0.2 * scale <= norm <= 3.0 * scale


def test_the_batches_and_the_divisor_follow_the_rate() -> None:
    engine, model, optimizer, loader = private(sigma=0.0, clip=1e-3)
    schedule = Schedule(optimizer, rate=Listed([1.0, 5.0]))
    seen, sizes = taken(model, optimizer), []
    for (x,) in loader:
        trained(model, optimizer, x.abs() + 1)
        sizes.append(len(x))
        schedule.step()
    assert sizes[1:] == [40] * 4, "rate 1 takes everybody"
    assert sizes[0] < 40
    assert [p.event for p in engine.ledger.phases] == [PoissonEvent(r, GaussianEvent(0.0)) for r in (0.2, 1.0)]
    norm = math.sqrt(sum(float(g.square().sum()) for g in seen[1].values()))
    assert norm <= 1e-3 * 1.0001, "40 examples of norm 1e-3 at most, over an expected batch of 40"
    assert norm > 0.2e-3


def test_prefetched_batches_are_billed_as_they_were_drawn() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = PrivacyEngine(accountant="rdp")
    data = DataLoader(TensorDataset(torch.randn(40, 3)), batch_size=8, num_workers=1)
    _, _, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    schedule = Schedule(optimizer, rate=Listed([1.0, 5.0]))
    sizes = []
    for (x,) in loader:
        trained(model, optimizer, x)
        sizes.append(len(x))
        schedule.step()
    rates = [p.event.rate for p in engine.ledger.phases for _ in range(p.count)]
    assert [rate == 1.0 for rate in rates] == [size == 40 for size in sizes]
    assert rates.count(0.2) > 1, "the worker had drawn ahead"


def test_the_sum_of_a_prefetched_batch_is_divided_by_the_size_expected_at_its_own_rate() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    data = DataLoader(TensorDataset(torch.ones(40, 3)), batch_size=8, num_workers=1)
    _, _, loader = PrivacyEngine(accountant="rdp").make_private(
        module=net, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=1e-3
    )
    schedule = Schedule(optimizer, rate=Listed([1.0, 5.0]))
    seen, sizes = taken(net, optimizer), []
    for (x,) in (batch for _ in range(2) for batch in loader):
        optimizer.zero_grad()
        (net(x) * 1e3).sum(1).mean().backward() if len(x) else net(x).sum().backward()
        optimizer.step()
        sizes.append(len(x))
        schedule.step()
    for gradient, size in zip(seen, sizes, strict=True):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        expected = 40 if size == 40 else 8  # everybody is in a batch of rate 1; of 0.2, eight are expected
        assert norm == pytest.approx(size * 1e-3 / expected, rel=1e-3), "all gradients are alike, and clipped"
    assert sum(size < 40 for size in sizes) > 1, "the worker had drawn ahead"
    assert sizes[-1] == 40


def test_a_budget_is_kept_under_a_schedule() -> None:
    mechanism = Mechanism(sampling=Poisson(0.2), clipping=Flat(1.0), noise=Gaussian(4.0), steps=20)
    plan = Plan(mechanism, noise=Exponential(0.97)).calibrated(epsilon=2.0, delta=1e-5, accountant="rdp")
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = PrivateStep(
        model,
        optimizer=optimizer,
        mechanism=plan.mechanism,
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
        expected_batch_size=8,
        budget=Budget(2.0, 1e-5),
    )
    schedule = Schedule.following(plan, optimizer)
    loader = step.batches(TensorDataset(torch.randn(40, 3)))
    done = []

    def run() -> None:
        for batch in (batch for _ in range(3) for batch in loader):
            done.append(step.epsilon(1e-5))
            step(batch)
            schedule.step()

    with pytest.raises(BudgetExceededError):
        run()
    assert len(done) >= 20, "the plan's accountant is the looser one"
    assert step.epsilon(1e-5) <= 2.0
    with pytest.raises(ConfigurationError, match="plan begins with"):
        Schedule.following(plan, optimizer)


def test_in_a_partition_a_new_clip_norm_is_no_new_participation() -> None:
    engine, model, optimizer, loader = private(poisson=False)
    schedule = Schedule(optimizer, clip_norm=Exponential(0.9))
    for (x,) in loader:
        trained(model, optimizer, x)
        schedule.step()
    assert [(p.event, p.count) for p in engine.ledger.phases] == [(PartitionEvent(1, GaussianEvent(2.0)), 1)]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None])
@pytest.mark.parametrize("what", ["noise", "clip_norm", "rate"])
def test_a_number_out_of_range_stops_the_run_before_the_step(what: str, value: Any) -> None:
    engine, model, optimizer, loader = private()
    schedule = Schedule(optimizer, **{what: lambda t: value if t == 2 else 1.0 - 0.1 * t})
    batches = iter(loader)
    trained(model, optimizer, next(batches)[0])
    schedule.step()
    trained(model, optimizer, next(batches)[0])
    before = engine.mechanisms, engine.ledger.phases
    with pytest.raises(ConfigurationError, match="schedule step 2"):
        schedule.step()
    assert (engine.mechanisms, engine.ledger.phases) == before
    assert engine.ledger.steps == 2
    assert schedule.steps == 1


@pytest.mark.parametrize("factor", [5e-324, 1.7e308])
def test_a_factor_in_range_whose_number_is_not(factor: float) -> None:
    engine, _, optimizer, _ = private(sigma=0.2 if factor < 1 else 2.0)
    schedule = Schedule(optimizer, noise=Listed([1.0, factor]))
    before = engine.mechanisms
    with pytest.raises(ConfigurationError, match="the noise multiplier at schedule step 1"):
        schedule.step()
    assert engine.mechanisms == before


def test_an_overflow_is_out_of_range() -> None:
    _, _, optimizer, _ = private()
    schedule = Schedule(optimizer, noise=Exponential(1e200))
    schedule.step()
    with pytest.raises(ConfigurationError, match="schedule step 2"):
        schedule.step()


def test_no_change_inside_a_logical_step() -> None:
    engine, model, optimizer, loader = private()
    schedule = Schedule(optimizer, noise=Exponential(0.5))
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for (x,) in parts:
            if not parts.last:
                with pytest.raises(ProtocolError, match="inside a logical step"):
                    schedule.step()
            optimizer.zero_grad()
            loss = model(x).square().sum(1).mean()
            loss.backward()
            with pytest.raises(ProtocolError, match="inside a logical step"):
                schedule.step()
            optimizer.step()
            if not parts.last:
                with pytest.raises(ProtocolError, match="inside a logical step"):
                    schedule.step()
                with pytest.raises(ProtocolError, match="inside a logical step"):
                    update_of(optimizer).mechanism = engine.mechanisms[0]
            else:
                schedule.step()
    assert engine.ledger.phases == schedule.plan(5).phases()


def test_one_schedule_for_each_number() -> None:
    _, _, optimizer, _ = private()
    Schedule(optimizer, noise=Exponential(0.5))
    Schedule(optimizer, clip_norm=Exponential(0.5))
    with pytest.raises(ConfigurationError, match="noise of this optimizer is scheduled already"):
        Schedule(optimizer, noise=Stepwise(1, 0.5))
    with pytest.raises(ConfigurationError, match="without a course"):
        Schedule(optimizer)
    with pytest.raises(ConfigurationError, match="not the optimizer of a private module"):
        Schedule(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), noise=Exponential(0.5))


def test_two_schedules_go_side_by_side() -> None:
    engine, _, optimizer, _ = private()
    noise, clip = Schedule(optimizer, noise=Exponential(0.5)), Schedule(optimizer, clip_norm=Exponential(0.1))
    for _ in range(2):
        noise.step()
        clip.step()
    (now,) = engine.mechanisms
    assert now.noise.multiplier == 0.5
    assert now.clipping.sensitivity == pytest.approx(0.005)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_run_resumes_where_its_schedules_were(tmp_path: Any) -> None:
    engine, model, optimizer, loader = private()
    schedules = [Schedule(optimizer, noise=Exponential(0.5)), Schedule(optimizer, rate=Listed([1.0, 0.5, 2.0]))]
    for (x,) in loader:
        trained(model, optimizer, x)
        for schedule in schedules:
            schedule.step()
    engine.save_checkpoint(tmp_path / "run", module=model, optimizer=optimizer)

    again, twin, other, fresh = private()
    with pytest.raises(ConfigurationError, match="has 2 schedules, and this run 0"):
        again.load_checkpoint(tmp_path / "run", module=twin, optimizer=other)
    assert again.ledger.steps == 0
    resumed = [Schedule(other, noise=Exponential(0.5)), Schedule(other, rate=Listed([1.0, 0.5, 2.0]))]
    again.load_checkpoint(tmp_path / "run", module=twin, optimizer=other)
    assert again.mechanisms == engine.mechanisms
    assert [s.steps for s in resumed] == [5, 5]
    assert fresh.sampling == loader.sampling == Poisson(0.4)

    third, twin, other, _ = private()
    Schedule(other, noise=Exponential(0.6))
    Schedule(other, rate=Listed([1.0, 0.5, 2.0]))
    with pytest.raises(ConfigurationError, match="of another schedule"):
        third.load_checkpoint(tmp_path / "run", module=twin, optimizer=other)
    assert third.ledger.steps == 0
