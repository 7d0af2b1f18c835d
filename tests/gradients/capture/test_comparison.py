"""The comparison of captured gradients: honest models pass, whatever rounds; planted faults are found in any format."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError
from privet.gradients.capture import comparison
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.first_batch import FirstBatch
from privet.gradients.capture.tripwire import Tripwires
from privet.gradients.use import Recorded, Use
from privet.validation import refuse_mixing
from tests.gradients.capture.honest import Attention, AttentionPooling, Swapped, T, batch_of, model_of

D = 8


def check(model: nn.Module, x: Tensor) -> None:
    """Runs the whole check on a batch, as the doors do."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    capture = Capture(parameters)
    tripwires = Tripwires(parameters, capture.release)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = FirstBatch(model, capture, tripwires, lambda x: [model(x)], also=lambda x: refuse_mixing(model, (x,), {}))
    try:
        first.run(x, len(x))
    finally:
        tripwires.remove()
    assert not first.due(len(x)), "the check was not conclusive"
    for name, p in model.named_parameters():
        assert p.dtype == before[name].dtype
        assert torch.equal(p, before[name])
        assert p.grad is None


# -- no false alarms ---------------------------------------------------------------------------------------------------


def honest(architectures: range, seeds: range) -> list[str]:
    """Returns the honest models that were refused."""
    refused = []
    for architecture, seed in itertools.product(architectures, seeds):
        torch.manual_seed(1000 * architecture + seed)
        model = model_of(architecture)
        try:
            check(model, batch_of(model, 2 + seed % 7))
        except Exception as error:  # noqa: BLE001 - all of them are listed
            refused.append(f"architecture {architecture}, seed {seed}: {type(error).__name__}: {error}")
    return refused


def test_honest_models_pass() -> None:
    assert honest(range(40), range(1)) == []


@pytest.mark.deep
@pytest.mark.parametrize("start", range(0, 100, 10))
def test_a_hundred_honest_models_pass_at_twenty_seeds_each(start: int) -> None:
    assert honest(range(start, start + 10), range(20)) == []


class Shaken(torch.autograd.Function):
    """The identity, whose backward adds relative noise that is another each time, as atomic additions do."""

    noise = torch.Generator().manual_seed(0)
    size = 1e-4

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * (1 + Shaken.size * torch.randn(g.shape, generator=Shaken.noise).to(g))


class ShakenAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (Shaken.apply(part(x)) for part in (self.q, self.k, self.v))
        return self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class OneType(nn.Module):
    """Refuses double precision, as some kernels do."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return self.part(x)


CANCELING: dict[str, Callable[[], nn.Module]] = {
    "bias before InstanceNorm": lambda: Swapped(nn.Conv1d(D, D, 3), nn.InstanceNorm1d(D)),
    "attention pooling": AttentionPooling,
    "bias of keys": lambda: Attention(causal=False),
    "shaken gradients": lambda: ShakenAttention(causal=False),
    "max-pool ties": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.MaxPool1d(4)),
    "ReLU": lambda: nn.TransformerEncoderLayer(D, 2, dim_feedforward=64, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("only_single", [False, True], ids=["any type", "one type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CANCELING)
def test_a_gradient_that_is_rounding_alone_is_no_alarm(kind: str, dtype: torch.dtype, only_single: bool) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        Shaken.size = 1e-4 if dtype == torch.float32 else 1e-3
        model = CANCELING[kind]().to(dtype)
        check(OneType(model) if only_single else model, torch.randn(6, T, D).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_alarm(dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(Attention(causal=True), nn.LayerNorm(D), AttentionPooling())
        with torch.autocast("cpu", dtype):
            check(model, torch.randn(6, T, D))


def test_values_beside_a_kink_are_no_alarm() -> None:
    class Kinks(nn.Module):
        """Some values are zero but for rounding, and on either side of it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            other = (x[..., None, :] * self.layer.weight).sum(-1) + self.layer.bias
            return torch.relu(h - other) + h

    check(Kinks(), torch.randn(6, T, D))


# -- faults are found --------------------------------------------------------------------------------------------------


class Tampered(Recorded):
    """Spoils one use of a weight."""

    fault = ""

    def put(self, target: Any, use: Use) -> None:
        if str(target).endswith("0.weight") and self.fault:
            if self.fault == "missed":
                return
            if self.fault == "doubled":
                super().put(target, use)
            else:
                order = torch.tensor([*range(use.rows)])
                order[:2] = torch.tensor([1, 0])
                use = Use(
                    use.operation, use.role, tuple(None if d is None else d[order] for d in use.data),
                    use.gradient[order], use.shape,
                )  # fmt: skip
        super().put(target, use)


@pytest.mark.parametrize("only_single", [False, True], ids=["any type", "one type"])
@pytest.mark.parametrize("examples", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["missed", "doubled", "order"])
def test_a_planted_fault_is_found(
    fault: str, dtype: torch.dtype, examples: int, only_single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "Recorded", Tampered)
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).to(dtype)
    model = OneType(net) if only_single else net
    x = torch.randn(examples, D).to(dtype)
    monkeypatch.setattr(Tampered, "fault", "")
    check(model, x)
    monkeypatch.setattr(Tampered, "fault", fault)
    with pytest.raises(CoverageError, match=r"0\.weight"):
        check(model, x)
