"""Several releases of one batch: billed as one sample that was asked several times; a sharpness-aware step by hand."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import (
    Budget,
    BudgetExceededError,
    ConfigurationError,
    Flat,
    Gaussian,
    Mechanism,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    ProtocolError,
    SeveralReleases,
    SharpnessAware,
)
from privet.accounting import get_accountant
from privet.accounting.event import GaussianEvent, PoissonEvent
from privet.noise.several import _DOWN
from tests.contracts.doors import assert_exact, distance, loader, reference, relative_error

OFF_THE_LOADER = "ignore:a step was taken on a batch that did not come:UserWarning"
C, RADIUS = 0.3, 0.5


# -- what it costs -----------------------------------------------------------------------------------------------------


def divergence(rate: float, sigma: float, epsilon: float, *, removed: bool) -> float:
    """Returns the hockey-stick divergence of two Gaussian releases of one Poisson sample, by integration in the plane.

    The outputs are (x + noise, x + noise) with x = 1 if the example was sampled, and 0 if not. Nothing is reduced to
    one dimension: the inner integral is over the second output, the outer one over the first.
    """
    mpmath.mp.dps = 20
    q, s, e = mpmath.mpf(rate), mpmath.mpf(sigma), mpmath.e ** mpmath.mpf(epsilon)

    def cdf(x: Any) -> Any:
        return mpmath.ncdf(x / s)

    def density(x: Any) -> Any:
        return mpmath.npdf(x / s) / s

    def inner(x: Any) -> Any:
        # With L(x, y) = (1 - q) + q exp((x + y - 1) / s^2), the set {L > e} is y above a bound, {1 / L > e} below one.
        wanted = (e - 1 + q) / q if removed else (1 / e - 1 + q) / q
        if wanted <= 0:
            return mpmath.mpf(0)
        bound = s**2 * mpmath.log(wanted) + 1 - x
        with_it, without = density(x - 1), density(x)
        if removed:  # P is the mixture
            mixture = (1 - q) * without * (1 - cdf(bound)) + q * with_it * (1 - cdf(bound - 1))
            return mixture - e * without * (1 - cdf(bound))
        mixture = (1 - q) * without * cdf(bound) + q * with_it * cdf(bound - 1)
        return without * cdf(bound) - e * mixture

    reach = 9 * s
    return float(mpmath.quad(inner, [-reach, 0, 0.5, 1, 1 + reach]))


@pytest.mark.parametrize(("rate", "sigma", "epsilon"), [(0.2, 1.5, 0.3), (1.0, 2.0, 0.5)])
def test_two_releases_of_one_sample_cost_what_is_billed(rate: float, sigma: float, epsilon: float) -> None:
    right = max(divergence(rate, sigma, epsilon, removed=removed) for removed in (True, False))
    mechanism = Mechanism(sampling=Poisson(rate), clipping=Flat(1.0), noise=SeveralReleases(sigma), steps=1)
    assert mechanism.event() == PoissonEvent(rate, GaussianEvent(sigma / math.sqrt(2) * _DOWN))
    accountant = get_accountant("pld")
    billed = accountant.delta(mechanism.event(), epsilon)
    assert right <= billed <= right * 1.01 + 1e-9
    one = Mechanism(sampling=Poisson(rate), clipping=Flat(1.0), noise=Gaussian(sigma), steps=1)
    assert accountant.delta(one.event(), epsilon) < 0.9 * right, "planted: one release billed"
    if rate < 1.0:
        assert accountant.delta(one.event(2), epsilon) < 0.99 * right, "planted: two samples billed, one for each"


def test_calibration_finds_the_noise_of_each_release() -> None:
    several, one = (
        Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=noise, steps=20).calibrated(epsilon=2.0, delta=1e-5)
        for noise in (SeveralReleases(1.0, releases=2), Gaussian(1.0))
    )
    assert several.noise.multiplier == pytest.approx(math.sqrt(2) * one.noise.multiplier, rel=1e-3)
    assert several.noise == SeveralReleases(several.noise.multiplier, 2)


# -- the step ----------------------------------------------------------------------------------------------------------


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch_of(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def aware(model: nn.Module, *, multiplier: float = 0.0, lr: float = 0.0, **options: Any) -> tuple[Any, PrivateStep]:
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        mechanism=Mechanism(sampling=Poisson(0.2), clipping=Flat(C), noise=SeveralReleases(multiplier), steps=5),
        loss_per_example=loss,
        expected_batch_size=1.0,
        accountant="rdp",
        **options,
    )
    return SharpnessAware(step, radius=RADIUS), step


def taken_by(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Returns the gradient that the optimizer steps by, without noise."""
    takes, step = aware(model)
    seen: dict[str, Tensor] = {}
    step.optimizer.register_step_pre_hook(
        lambda *rest: seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    takes(batch)
    return seen


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_the_step_is_by_the_gradient_uphill_of_one_example_at_a_time() -> None:
    model, batch = net(), batch_of(6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = taken_by(model, batch)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "put back, to the bit"
    uphill, plain = net(), reference(net(), batch, loss, Flat(C))
    length = torch.stack([g.norm() for g in plain.values()]).norm()
    with torch.no_grad():
        for name, p in uphill.named_parameters():
            p.add_(RADIUS * plain[name] / length)
    assert_exact(found, reference(uphill, batch, loss, Flat(C)))
    assert relative_error(found, plain) > 0.01, "planted: the gradient of where the weights were"


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_one_example_moves_each_of_the_two_sums_by_the_clip_norm_at_most() -> None:
    batch = batch_of(6)
    batch[0][-1] *= 1000.0
    sums: list[list[dict[str, Tensor]]] = []
    for size in (6, 5):
        model, seen = net(), []
        _, step = aware(model)

        def keep(number: int, model: nn.Module = model, seen: list[Any] = seen) -> None:
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        step.several((batch[0][:size], batch[1][:size]), keep)
        sums.append(seen)
    for first, second in zip(*sums, strict=True):
        assert 0.5 * C < distance(first, second) <= C * (1 + 1e-9)


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_each_release_has_noise_of_its_own_of_the_declared_size() -> None:
    model, seen = nn.Linear(4, 400), []
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        mechanism=Mechanism(sampling=Poisson(0.2), clipping=Flat(C), noise=SeveralReleases(2.0, 3), steps=5),
        loss_per_example=lambda m, b: 0.0 * m(b[0]).sum(1),
        expected_batch_size=1.0,
    )
    step.several((torch.randn(4, 4),), lambda number: seen.append(model.weight.grad.flatten().double()))
    assert len(seen) == 3
    n = len(seen[0])
    for each in seen:
        assert abs(float(each.square().mean()) / (2.0 * C) ** 2 - 1.0) < 6 * (2 / n) ** 0.5
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack([seen[a], seen[b]]))[0, 1])) < 6 / n**0.5


def data(n: int = 40) -> torch.utils.data.TensorDataset:
    x, y = batch_of(n)
    return torch.utils.data.TensorDataset(x, y)


def test_a_batch_is_billed_once_for_both_releases() -> None:
    model = net()
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.2), clipping=Flat(C), noise=SeveralReleases(2.0), steps=5),
        loss_per_example=loss,
    )
    takes = SharpnessAware(step, radius=0.1)
    for batch in step.batches(data()):
        takes(batch)
    event = PoissonEvent(0.2, GaussianEvent(2.0 / math.sqrt(2) * _DOWN))
    assert [(phase.event, phase.count) for phase in step.ledger.phases] == [(event, 5)]
    assert step.epsilon(delta=1e-5) == step.mechanism.epsilon(delta=1e-5)


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_a_second_step_on_a_batch_is_never_free() -> None:
    _, step = aware(net(), multiplier=2.0)
    batch = batch_of(4)
    for _ in range(2):
        step(batch)
    assert [(phase.event, phase.count) for phase in step.ledger.phases] == [(step.mechanism.release, 2)]


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_whatever_fails_in_between_the_next_step_is_billed_and_the_weights_are_put_back() -> None:
    model = net()
    takes, step = aware(model, multiplier=2.0)
    before = [p.detach().clone() for p in model.parameters()]
    forward, calls = model.forward, 0

    def fails(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise ZeroDivisionError
        return forward(x)

    takes(batch_of(4))  # the check of the first batch runs the model often
    model.forward, failing = fails, 2
    with pytest.raises(ZeroDivisionError):
        takes(batch_of(4))
    assert all(torch.equal(p, each) for p, each in zip(model.parameters(), before, strict=True))
    assert step.ledger.steps == 2
    takes(batch_of(4))
    assert step.ledger.steps == 3


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_a_budget_refuses_the_first_release_and_takes_no_step() -> None:
    model = net()
    takes, step = aware(model, multiplier=1.0, lr=0.1, budget=Budget(epsilon=1e-3, delta=1e-5))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(BudgetExceededError):
        takes(batch_of(4))
    assert step.ledger.steps == 0
    assert all(torch.equal(p, each) for p, each in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings(OFF_THE_LOADER)
def test_what_is_not_declared_is_refused_in_words() -> None:
    model = net()
    step = PrivateStep(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.2), clipping=Flat(C), noise=Gaussian(1.0), steps=5),
        loss_per_example=loss,
        expected_batch_size=1.0,
    )
    with pytest.raises(ConfigurationError, match="SeveralReleases"):
        SharpnessAware(step)(batch_of(4))
    with pytest.raises(ConfigurationError, match="declares one"):
        step.several(batch_of(4), lambda number: None)
    assert step.ledger.steps == 0
    other = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="paper's door"):
        PrivacyEngine().make_private(
            module=other,
            optimizer=torch.optim.SGD(other.parameters(), lr=0.1),
            data_loader=loader(),
            noise_multiplier=1.0,
            noise=SeveralReleases(1.0),
            max_grad_norm=1.0,
        )
    _, step = aware(net(), multiplier=2.0)

    def changes(number: int) -> None:
        from dataclasses import replace

        step._update.mechanism = replace(step.mechanism, clipping=Flat(2 * C))

    with pytest.raises(ProtocolError, match="changed between two releases"):
        step.several(batch_of(4), changes)
