"""A GradScaler in the user's own loop: its scale cancels before the norms, and nothing of the data reaches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from privet import BatchMemoryManager, PrivacyEngine
from privet.errors import ConfigurationError, ProtocolError
from privet.training.loss_scale import LossScale

pytestmark = pytest.mark.filterwarnings(
    "ignore:a step was taken on a batch that did not come:UserWarning", "ignore:.*noise_multiplier:UserWarning",
    "ignore:.*no noise:UserWarning",
)  # fmt: skip
WIDTH, CLIP = 4, 1.5  # between the norms: some examples are clipped, and some are not
MODES = ("auto", "hooks", "functorch")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(WIDTH, WIDTH, generator=made), torch.randint(WIDTH, (WIDTH,), generator=made)


class Run:
    """The loop of torch's own pages on mixed precision, with a private model."""

    def __init__(self, scaler: Any, optimizer: Any = torch.optim.SGD, **options: Any) -> None:
        self.net, self.engine, self.scaler = net(), PrivacyEngine(), scaler
        data = TensorDataset(*(t.repeat(4, *[1] * (t.dim() - 1)) for t in batch()))
        options = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "grad_scaler": scaler, **options}
        _, self.optimizer, self.loader = self.engine.make_private(
            module=self.net,
            optimizer=optimizer(self.net.parameters(), lr=0.5),
            data_loader=DataLoader(data, batch_size=WIDTH),
            **options,
        )

    def loss(self, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return F.cross_entropy(self.net(x), y)

    def step(self, pair: Any, *, dtype: torch.dtype | None = None, clipped: float | None = None) -> list[torch.Tensor]:
        loss = self.loss(*pair, dtype)
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer) if clipped else None
        if clipped:
            if self.scaler is None:
                raise AssertionError("clipped gradients need unscale_")
            nn.utils.clip_grad_norm_(self.net.parameters(), clipped)
        self.scaler.step(self.optimizer) if self.scaler else self.optimizer.step()
        self.scaler.update() if self.scaler else None
        found = [p.grad.detach().clone() for p in self.net.parameters()]
        self.optimizer.zero_grad()
        return found


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


def one_at_a_time(module: nn.Module, pair: Any, examples: range = range(WIDTH)) -> list[torch.Tensor]:
    """Returns the clipped mean of some examples, by a loop in full precision without any scale."""
    total = [torch.zeros_like(p) for p in module.parameters()]
    for i in examples:
        grads = torch.autograd.grad(
            F.cross_entropy(module(pair[0][i : i + 1]), pair[1][i : i + 1]), module.parameters()
        )
        norm = float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
        for t, g in zip(total, grads, strict=True):
            t.add_(g * min(1.0, CLIP / norm))
    return [t / WIDTH for t in total]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


CASES = [*((mode, None, "mean") for mode in MODES), *((mode, torch.float16, "mean") for mode in MODES)]
CASES += [("auto", torch.bfloat16, "mean"), ("auto", None, "sum"), ("auto", torch.float16, "sum")]


@pytest.mark.parametrize(("mode", "dtype", "reduction"), CASES)
def test_a_scaled_step_is_the_step_of_one_example_at_a_time(mode: str, dtype: Any, reduction: str) -> None:
    run = Run(scaler(), grad_sample_mode=mode, loss_reduction=reduction)
    expected = one_at_a_time(net(), batch())
    if reduction == "sum":
        expected = [g * WIDTH for g in expected]
        run.loss = lambda x, y, dtype: Run.loss(run, x, y, dtype) * WIDTH  # type: ignore[method-assign]
    coarse = {None: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert_near(run.step(batch(), dtype=dtype), expected, coarse)
    assert run.engine.ledger.steps == 1
    assert run.scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("mode", MODES)
def test_planted_a_scale_that_is_forgotten_is_found(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScale, "taken", lambda self: 1.0)
    found = Run(scaler(), grad_sample_mode=mode).step(batch())
    with pytest.raises(AssertionError):
        assert_near(found, one_at_a_time(net(), batch()))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_those_of_a_loop_without_a_scaler_and_none_is_skipped(optimizer: Any, fused: bool) -> None:
    def made(params: Any, lr: float) -> torch.optim.Optimizer:
        return optimizer(params, lr=lr, fused=fused)

    options = {"noise_multiplier": 1.0}
    runs = [Run(each, made, noise_generator=torch.Generator().manual_seed(5), **options) for each in (scaler(), None)]
    for seed in (1, 2, 3):
        for run in runs:
            run.step(batch(seed))
    for a, b in zip(runs[0].net.parameters(), runs[1].net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert runs[0].engine.ledger.steps == 3


def test_an_example_that_overflows_adds_nothing_and_the_others_are_as_they_were() -> None:
    """In float16 the scaled gradient of the last example is infinite; the step is taken, and the scale stays."""
    x, y = batch()
    run = Run(scaler(init_scale=2.0**14))
    module = net()
    with torch.autocast("cpu", dtype=torch.float16):
        weights = torch.ones(WIDTH)
        weights[-1] = 1e5  # its loss alone overflows once it is scaled
        losses = F.cross_entropy(run.net(x), y, reduction="none") * weights
        run.scaler.scale(losses.mean()).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    found = [p.grad for p in run.net.parameters()]
    assert_near(found, one_at_a_time(module, (x, y), range(WIDTH - 1)), 2e-2)
    assert run.scaler.get_scale() == 2.0**14
    assert run.engine.ledger.steps == 1


def test_one_example_moves_the_sum_by_the_clip_norm_at_most() -> None:
    x, y = batch()
    found = {}
    for name, pair in {
        "all": (x, y),
        "large": (torch.cat([x[:-1], x[-1:] * 1000]), y),
        "fewer": (x[:-1], y[:-1]),
    }.items():
        found[name] = Run(scaler()).step(pair, dtype=torch.float16)
    for other, most in (("fewer", 1.0), ("large", 2.0)):
        distance = torch.stack([(a - b).square().sum() for a, b in zip(found["all"], found[other], strict=True)])
        assert 0.0 < float(distance.sum().sqrt()) * WIDTH <= most * CLIP * 1.001


def test_released_gradients_are_clipped_after_unscale() -> None:
    run = Run(scaler())
    found = run.step(batch(), clipped=1e-3)
    assert float(torch.stack([g.square().sum() for g in found]).sum().sqrt()) == pytest.approx(1e-3, rel=1e-3)
    assert run.engine.ledger.steps == 1  # unscale_ releases, and the step does not once more
    plain = one_at_a_time(net(), batch())
    norm = float(torch.stack([g.square().sum() for g in plain]).sum().sqrt())
    assert_near(found, [g * 1e-3 / norm for g in plain], 1e-3)


@pytest.mark.parametrize("way", ["virtual steps", "accumulate"])
def test_parts_of_a_batch_make_one_step(way: str) -> None:
    options: dict[str, Any] = {"noise_generator": torch.Generator().manual_seed(2)}
    run = Run(scaler(), **options, **({"accumulate": 2} if way == "accumulate" else {}))
    if way == "accumulate":
        for place, (x, y) in enumerate(run.loader):
            run.scaler.scale(run.loss(x, y, None) / 2).backward()
            if place % 2:
                run.scaler.step(run.optimizer)
                run.scaler.update()
                run.optimizer.zero_grad()
        assert run.engine.ledger.steps == len(run.loader) // 2
        return
    with BatchMemoryManager(data_loader=run.loader, max_physical_batch_size=2, optimizer=run.optimizer) as loader:
        for pair in loader:
            run.scaler.scale(run.loss(*pair, None)).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad()
    assert run.engine.ledger.steps == len(run.loader)


def test_what_does_not_fit_is_refused() -> None:
    run = Run(scaler())
    with pytest.raises(ProtocolError, match="the loss of this backward was not scaled"):
        run.loss(*batch(), None).backward()
    with pytest.raises(ConfigurationError, match="power of two"):
        Run(scaler(init_scale=1000.0))
    with pytest.raises(ConfigurationError, match=r"must be a torch\.amp\.GradScaler, got int"):
        Run(5)
    run = Run(scaler())
    run.scaler.scale(run.loss(*batch(), None)).backward()
    run.scaler.step(run.optimizer)
    with pytest.raises(ConfigurationError, match="power of two"):
        run.scaler.update(3.0)
    run.scaler.update(2.0**10)
    assert run.scaler.get_scale() == 2.0**10


def test_a_detached_scaler_is_torchs_own_and_adapts_again() -> None:
    run = Run(scaler(growth_interval=1))
    run.step(batch())
    assert run.scaler.get_scale() == 2.0**16
    run.engine.detach(run.net)
    assert not {"scale", "unscale_", "step", "update"} & set(vars(run.scaler))
    run.step(batch())
    assert run.scaler.get_scale() == 2.0**17
    assert run.engine.ledger.steps == 1


def test_a_scaler_that_is_off_changes_nothing() -> None:
    run = Run(scaler(enabled=False))
    assert_near(run.step(batch()), one_at_a_time(net(), batch()))
