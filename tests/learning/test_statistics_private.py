"""Private statistics: bounded by one example, billed before the noise, with the noise that is billed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import (
    Budget,
    BudgetExceededError,
    ConfigurationError,
    Ledger,
    PrivacyEngine,
    norm_quantile,
    private_moments,
    private_quantile,
)
from privet.accounting.event import GaussianEvent
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.reference import example_gradients
from privet.learning import statistics
from privet.noise import GaussianNoise

RANGE: dict[str, Any] = {"low": 1e-3, "high": 1e3}


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float, float]]:
    """Returns a list to which every release is added: the sum, its sensitivity, and the multiplier of its noise."""
    seen: list[tuple[Tensor, float, float]] = []
    release = GaussianNoise.release

    def look(self: GaussianNoise, sums: ClippedSum, *, multiplier: float, **rest: Any) -> Any:
        seen.append((sums.values["statistic"].clone(), sums.sensitivity, multiplier))
        return release(self, sums, multiplier=multiplier, **rest)

    monkeypatch.setattr(GaussianNoise, "release", look)
    return seen


def test_without_noise_it_is_the_quantile() -> None:
    values = torch.rand(1001).exp()
    for quantile in (0.1, 0.5, 0.9):
        found = private_quantile(
            values, quantile, **RANGE, noise_multiplier=0.0, ledger=Ledger(relation="zero_out"), queries=30
        )
        assert found == pytest.approx(float(values.quantile(quantile)), rel=0.01)


def test_with_noise_it_is_near_the_quantile_and_billed_once() -> None:
    ledger, values = Ledger(relation="zero_out"), torch.rand(20_000)
    found = private_quantile(values, 0.3, **RANGE, noise_multiplier=10.0, ledger=ledger)
    assert found == pytest.approx(0.3, abs=0.03)
    assert [(phase.event, phase.count) for phase in ledger.phases] == [(GaussianEvent(10.0), 1)]


@pytest.mark.parametrize("last", [-5.0, 0.5, 1e9, math.nan, math.inf])
def test_one_value_moves_each_count_by_a_half_and_all_cost_one_gaussian(released: Any, last: float) -> None:
    values, queries, multiplier = torch.rand(50), 8, 3.0
    values[-1] = last
    private_quantile(
        values, 0.5, **RANGE, noise_multiplier=multiplier, ledger=Ledger(relation="zero_out"), queries=queries
    )
    assert len(released) == queries
    # The squared loss of each count is (1 / multiplier)^2; together they are that of what is billed, and no more.
    assert sum(z**-2 for *_, z in released) == pytest.approx(multiplier**-2, rel=1e-9)
    assert sum(z**-2 for *_, z in released) <= multiplier**-2
    thresholds: list[float] = []
    low, high = RANGE["low"], RANGE["high"]
    middle = math.sqrt(low) * math.sqrt(high)
    with_it = float((values <= middle).sum()) - 25.0
    without = float((values[:-1] <= middle).sum()) - 24.5
    thresholds.append(abs(with_it - without))
    assert float(released[0][0]) == with_it
    assert max(thresholds) <= released[0][1] == 0.5


def pictures(n: int = 60) -> Tensor:
    return torch.rand(n, 3, 4, 4)


def test_without_noise_they_are_the_moments() -> None:
    x = torch.stack([torch.rand(500) * 0.2, torch.rand(500) + 3.0, torch.full((500,), 9.0)], 1)
    bounds: dict[str, Any] = {"low": torch.tensor([0.0, 0.0, 0.0]), "high": torch.tensor([1.0, 10.0, 5.0])}
    found = private_moments(x, **bounds, noise_multiplier=0.0, ledger=Ledger(relation="zero_out"))
    clamped = x.clamp(max=torch.tensor([1.0, 10.0, 5.0]))
    assert torch.allclose(found.mean, clamped.mean(0), atol=1e-5)
    assert torch.allclose(found.deviation[:2], clamped.std(0, correction=0)[:2], rtol=1e-3)
    assert 0.0 < float(found.deviation[2]) <= 0.01
    parts = private_moments(x.split(7), **bounds, noise_multiplier=0.0, ledger=Ledger(relation="zero_out"))
    assert torch.allclose(parts.mean, found.mean, atol=1e-6)
    assert found.normalize(x)[:, :2].std() == pytest.approx(1.0, rel=0.05)


def test_channels_are_averaged_over_pixels_and_normalized() -> None:
    x = pictures()
    found = private_moments(x, low=0.0, high=1.0, noise_multiplier=0.0, ledger=Ledger(relation="zero_out"))
    assert torch.allclose(found.mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(found.deviation, x.transpose(0, 1).flatten(1).std(1, correction=0), rtol=1e-3)
    assert found.normalize(x).shape == x.shape


@pytest.mark.parametrize("last", [0.0, 1.0, 1e30, -1e30, math.nan, math.inf])
def test_one_example_moves_the_sum_by_the_sensitivity_at_most(released: Any, last: float) -> None:
    x, ledger = pictures(), Ledger(relation="zero_out")
    x[-1] = last
    for rows in (x, x[:-1]):
        private_moments(rows, low=0.0, high=1.0, noise_multiplier=2.0, ledger=ledger)
    (with_it, bound, multiplier), (without, *_) = released
    moved = float((with_it - without).norm())
    assert moved <= bound * (1 + 1e-12) == pytest.approx(math.sqrt(3.75))
    assert moved > 0.9 * bound or not math.isfinite(last), "the bound is met, or nothing was added"
    assert multiplier == pytest.approx(2.0)
    assert [(phase.event, phase.count) for phase in ledger.phases] == [(GaussianEvent(2.0), 2)]


def test_a_contribution_that_is_not_bounded_is_found(released: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: values are not clamped."""
    monkeypatch.setattr(Tensor, "clamp", lambda self, *rest, **options: self)
    x = pictures()
    x[-1] = 100.0
    for rows in (x, x[:-1]):
        private_moments(rows, low=0.0, high=1.0, noise_multiplier=1.0, ledger=Ledger(relation="zero_out"))
    assert float((released[0][0] - released[1][0]).norm()) > 10 * released[0][1]


def test_the_noise_is_of_the_size_that_is_billed() -> None:
    x = torch.full((1, 4000), 0.5)  # u = 0: an example adds 0 and -1/2
    half, middle = statistics._range(0.0, 1.0, 4000)
    exact = statistics._contributions(x, half, middle).sum(0)
    release = statistics._Release(Ledger(relation="zero_out"), 2.0, None)
    noise = (release(exact, sensitivity=3.0) - exact).flatten()
    assert abs(float(noise.square().mean()) / 36.0 - 1.0) < 6 * (2 / len(noise)) ** 0.5


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_the_quantile_of_norms_is_that_of_one_example_at_a_time_and_joins_the_bill_of_training() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), TensorDataset(torch.randn(40, 3))
    labelled = TensorDataset(data.tensors[0], torch.randint(2, (40,)))
    engine = PrivacyEngine()
    rows = [(labelled.tensors[0][i : i + 1], labelled.tensors[1][i : i + 1]) for i in range(40)]
    gradients = example_gradients(net, rows, lambda m, b: loss(m, b).sum())
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    loader = DataLoader(labelled, batch_size=16)
    exact = norm_quantile(
        net, loss, loader, quantile=0.7, noise_multiplier=0.0, ledger=Ledger(relation="zero_out"), queries=30
    )
    assert float((norms <= exact).float().mean()) == pytest.approx(0.7, abs=1 / 40)
    clip = norm_quantile(net, loss, loader, noise_multiplier=5.0, ledger=engine.ledger)
    assert all(p.grad is None for p in net.parameters())
    net, optimizer, private = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=2.0,
        max_grad_norm=clip,
    )
    before = engine.get_epsilon(delta=1e-5)
    assert before > 0.0
    for batch in private:
        optimizer.zero_grad()
        loss(net, batch).mean().backward()
        optimizer.step()
    assert engine.get_epsilon(delta=1e-5) > before
    with pytest.raises(ConfigurationError, match="private already"):
        norm_quantile(net, loss, loader, noise_multiplier=5.0, ledger=engine.ledger)


def test_nothing_that_a_forward_writes_stays_in_the_model() -> None:
    class Remembers(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += x.sum(0)
            return super().forward(x)

    net = Remembers()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    norm_quantile(net, loss, data, noise_multiplier=5.0, ledger=Ledger(relation="zero_out"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_cannot_be_right_is_refused_and_nothing_is_billed(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(relation="zero_out", budget=Budget(epsilon=0.1, delta=1e-5))
    good: dict[str, Any] = {**RANGE, "noise_multiplier": 1.0, "ledger": ledger}
    with pytest.raises(BudgetExceededError):
        private_quantile(torch.rand(9), 0.5, **good)
    for wrong in ({"low": 2e3}, {"low": 0.0}, {"high": math.inf}, {"queries": 0}, {"noise_multiplier": -1.0}):
        with pytest.raises(ConfigurationError):
            private_quantile(torch.rand(9), 0.5, **{**good, **wrong})
    for values in (torch.rand(3, 2), torch.rand(0), [1.0]):
        with pytest.raises(ConfigurationError, match="one value for each example"):
            private_quantile(values, 0.5, **good)  # type: ignore[arg-type]
    bounds: dict[str, Any] = {"noise_multiplier": 1.0, "ledger": ledger}
    for low, high in ((1.0, 1.0), (-math.inf, 1.0), (math.nan, 1.0)):
        with pytest.raises(ConfigurationError, match="low and high must be finite"):
            private_moments(pictures(), low=low, high=high, **bounds)
    for data in (torch.rand(3), [], [torch.rand(2, 3), torch.rand(2, 4)], torch.rand(0, 3)):
        with pytest.raises(ConfigurationError):
            private_moments(data, low=0.0, high=1.0, **bounds)
    with pytest.raises(BudgetExceededError):
        private_moments(pictures(), low=0.0, high=1.0, **bounds)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigurationError, match="on 2 ranks"):
        private_quantile(torch.rand(9), 0.5, **good)
    assert ledger.steps == 0


def test_neighbors_of_another_number_are_refused_before_anything_is_billed() -> None:
    ledger = Ledger(relation="add_or_remove_one")
    with pytest.raises(ConfigurationError, match="takes the number of examples as public"):
        private_quantile(torch.rand(9), 0.9, low=0.1, high=1.0, noise_multiplier=1.0, ledger=ledger)
    assert ledger.steps == 0
