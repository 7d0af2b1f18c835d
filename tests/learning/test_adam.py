"""Adam corrected for the noise: against the algorithm in float64; what it takes off against the noise that is there."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import (
    AdamBC,
    Adaptive,
    BandMF,
    ChainedOptimizer,
    ConfigurationError,
    Exponential,
    Flat,
    Gaussian,
    Mechanism,
    Partition,
    PrivateStep,
    ProtocolError,
    Schedule,
)
from privet.training.guard import deviation_of

BETAS = (0.8, 0.95)


def algorithm(
    start: list[Tensor],
    gradients: list[list[Tensor]],
    deviations: list[float],
    *,
    lr: float,
    floor: float,
    decay: float,
) -> list[Tensor]:
    """Returns the weights after DP-AdamBC, as the paper writes it, in float64; the variance may differ by step."""
    found, (b1, b2) = [], BETAS
    for i, p in enumerate(start):
        w, m, v, n = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double(), 0.0
        for t, (each, s) in enumerate(zip(gradients, deviations, strict=True), 1):
            g = each[i].double()
            m, v, n = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, b2 * n + (1 - b2) * s * s
            corrected = (v - n) / (1 - b2**t)
            w = w * (1 - lr * decay)
            w = w - lr * (m / (1 - b1**t)) / torch.clamp(corrected, min=floor).sqrt()
        found.append(w)
    return found


def seen_by(run: Any) -> list[list[Tensor]]:
    gradients: list[list[Tensor]] = []
    run.optimizer.register_step_pre_hook(
        lambda o, *rest: gradients.append([p.grad.clone() for p in run.net.parameters()])
    )
    return gradients


def test_the_step_is_that_of_the_paper(door: str, make_run: Any) -> None:
    run = make_run(door, lambda net: AdamBC(net.parameters(), lr=0.05, betas=BETAS, floor=0.01, weight_decay=0.1))
    start, gradients = run.weights, seen_by(run)
    run.train()
    deviation = 2.0 * 1.5 / 8.0  # noise multiplier, clip norm, expected batch size
    right = algorithm(start, gradients, [deviation] * 5, lr=0.05, floor=0.01, decay=0.1)
    for found, each in zip(run.weights, right, strict=True):
        assert torch.allclose(found.double(), each, rtol=1e-4, atol=1e-5)
    for wrong in (2.0 * 1.5, 2.0 / 8.0, 0.0):  # planted: not divided, without the clip norm, not corrected at all
        other = algorithm(start, gradients, [wrong] * 5, lr=0.05, floor=0.01, decay=0.1)
        assert not torch.allclose(run.weights[0].double(), other[0], atol=1e-3)


def test_the_noise_follows_schedules(make_run: Any) -> None:
    run = make_run("explicit", lambda net: AdamBC(net.parameters(), lr=0.05, betas=BETAS, floor=0.01))
    schedule = Schedule(run.optimizer, noise=Exponential(0.8), clip_norm=Exponential(0.9), rate=Exponential(1.1))
    start, gradients, deviations = run.weights, seen_by(run), []
    for t, batch in enumerate(run.loader):
        run.step(batch)
        deviations.append(2.0 * 0.8**t * 1.5 * 0.9**t / (8.0 * 1.1**t))
        schedule.step()
    right = algorithm(start, gradients, deviations, lr=0.05, floor=0.01, decay=0.0)
    for found, each in zip(run.weights, right, strict=True):
        assert torch.allclose(found.double(), each, rtol=1e-4, atol=1e-5)
    assert len(set(deviations)) == 5


@pytest.mark.parametrize("clipping", [Flat(1.5), Adaptive(1.5)], ids=["flat", "adaptive"])
def test_what_is_taken_off_is_the_variance_that_is_there(door: str, make_run: Any, clipping: Any) -> None:
    """No example has a gradient: the squares of what is released are the noise's alone."""

    class Still(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.0

    run = make_run(door, lambda net: AdamBC(net.parameters(), lr=0.0), clipping=clipping, net=Still(3, 500))
    ratios: list[float] = []

    def look(optimizer: Any, *rest: Any) -> None:
        for p in run.net.parameters():
            deviation = deviation_of(p.grad)
            assert deviation is not None
            ratios.extend((p.grad.double() / deviation).square().flatten().tolist())

    run.optimizer.register_step_pre_hook(look)
    run.train()
    mean = sum(ratios) / len(ratios)
    assert abs(mean - 1.0) < 6.0 * (2.0 / len(ratios)) ** 0.5


def test_without_a_floor_given_noise_alone_moves_no_weight_far(make_run: Any) -> None:
    """The default floor is one deviation of what noise alone leaves: steps stay within a few times those of Adam."""
    run = make_run("explicit", lambda net: AdamBC(net.parameters(), lr=0.01), steps=30, net=nn.Linear(3, 200))
    before = run.weights
    run.train()
    moved = max(float((a - b).abs().max()) for a, b in zip(before, run.weights, strict=True))
    assert 0.0 < moved < 30 * 0.01 * 5


def test_without_noise_it_is_adam_with_a_floor(make_run: Any) -> None:
    def quiet(net: nn.Module) -> AdamBC:
        return AdamBC(net.parameters(), lr=0.05, betas=BETAS)

    with pytest.warns(UserWarning):  # noqa: PT030 - that there is no noise
        run = make_run("explicit", quiet, noise=Gaussian(0.0))
    start, gradients = run.weights, seen_by(run)
    run.train()
    right = algorithm(start, gradients, [0.0] * 5, lr=0.05, floor=1e-16, decay=0.0)
    for found, each in zip(run.weights, right, strict=True):
        assert torch.allclose(found.double(), each, rtol=1e-4, atol=1e-5)


def test_it_may_be_one_of_several_and_its_state_goes_through_a_checkpoint(make_run: Any) -> None:
    def chained(net: nn.Module) -> ChainedOptimizer:
        return ChainedOptimizer(AdamBC([net.weight], lr=0.05), torch.optim.SGD([net.bias], lr=0.1))

    run = make_run("explicit", chained, steps=2)
    file = io.BytesIO()
    run.train().door.save_checkpoint(file)
    file.seek(0)
    other = make_run("explicit", chained, steps=2, seed=3)
    other.door.load_checkpoint(file)
    mine, theirs = (each.optimizer.optimizers[0].state_dict()["state"][0] for each in (run, other))
    assert mine["step"] == theirs["step"] == 2
    assert mine["noise"] == theirs["noise"] > 0.0
    other.train()


def test_what_it_does_not_know_the_noise_of_is_refused() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    net(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ProtocolError, match="no private step has released"):
        AdamBC(net.parameters()).step()
    step = PrivateStep(
        net := nn.Linear(3, 2),
        optimizer=AdamBC(net.parameters()),
        mechanism=Mechanism(
            sampling=Partition(shuffled=False, batch_size=8, dataset_size=40),
            clipping=Flat(1.0),
            noise=BandMF(2.0, (1.0, 0.5)),
        ),
        loss_per_example=lambda m, b: m(b[0]).square().sum(1),
    )
    data = torch.utils.data.TensorDataset(torch.randn(40, 3))
    with pytest.raises(ProtocolError, match="correlated over steps"):
        step(next(iter(step.batches(data))))
    assert before.shape == net.weight.shape
    with pytest.raises(ConfigurationError, match="is 1"):
        AdamBC(net.parameters(), betas=(0.9, 1.0))
