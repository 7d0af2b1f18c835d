"""A table that is also the last layer: the exact norm of the sum of two gradients, and no table for each example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from privet import Flat
from privet.gradients import gathered, rules
from tests.contracts.doors import DOORS, assert_exact, door_sum, reference, relative_error

V, D, T = 50, 6, 7


class Language(nn.Module):
    """Predicts each token from the one before; input and output embedding are one."""

    def __init__(self, *, bias: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(V, D), nn.Linear(D, D)
        self.bias = nn.Parameter(torch.zeros(V)) if bias else None
        self.factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.middle(self.table(ids))) * self.factor
        return F.linear(h, self.table.weight, self.bias)


def next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    (ids,) = batch
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).sum(1)


def batch_of(n: int, entries: int = V) -> tuple[Tensor]:
    return (torch.randint(entries, (n, T), generator=torch.Generator().manual_seed(n)),)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("examples", "entries"), [(1, V), (2, 3), (17, V)])
def test_the_sum_is_the_reference(door: str, examples: int, entries: int, bias: bool) -> None:
    torch.manual_seed(0)
    net, batch = Language(bias=bias).double(), batch_of(examples, entries)
    assert_exact(door_sum(door, net, batch, loss=next_token), reference(net, batch, next_token, Flat(1.0)))


@pytest.mark.parametrize("factor", [1e-15, 1.0, 1e15])
def test_the_sum_is_the_reference_in_single_precision_whatever_the_scale(factor: float) -> None:
    torch.manual_seed(0)
    net, batch = Language(), batch_of(17)

    def scaled(model: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        return next_token(model, b) * factor

    found = door_sum("explicit", net, batch, loss=scaled)
    expected = reference(net.double(), batch, scaled, Flat(1.0))
    assert_exact(found, expected)


class Cancelling(nn.Module):
    """A loss in which the table's two gradients are each other's negative but for a small part, in some examples."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.rest = rest

    def forward(self, ids: Tensor) -> Tensor:  # (B, 1)
        looked_up = self.table(ids)  # its gradient is that of entry `ids`
        a = looked_up.detach()
        logits = F.linear(a, self.table.weight).gather(2, ids.unsqueeze(2)).squeeze(2)  # a . w[ids], a held fixed
        whole = (ids % 2).double().to(a.dtype)  # even ids cancel
        return logits - (1.0 - self.rest) * (1.0 - whole) * (looked_up * a).sum(2)


@pytest.mark.parametrize("rest", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_nearly_cancel_are_formed(rest: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, batch = Cancelling(rest).to(dtype), (torch.arange(8).unsqueeze(1),)

    def loss(model: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        return model(b[0]).sum(1) * 1e4

    found = door_sum("explicit", net, batch, loss=loss)
    expected = reference(net, batch, loss, Flat(1.0))
    sizes = found["table.weight"].norm(dim=1)[:8]
    # Each of the two is summed by itself, and rounds by its own size: 1 / rest times what is left of them.
    rounding = 4.0 * torch.finfo(dtype).eps / rest
    assert float(sizes.max()) <= 1.0 + 1e-6 + rounding
    limit = 1e-9 if dtype is torch.float64 else 1e-4
    assert float((found["table.weight"] - expected["table.weight"]).norm()) <= limit + 8.0 * rounding


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


def largest(net: nn.Module, batch: tuple[Tensor], loss: Any) -> int:
    from privet.gradients.capture.capture import Capture
    from privet.gradients.capture.coverage import learn_layouts
    from privet.gradients.summation import clipped_sum
    from privet.gradients.use import Recorded

    parameters = dict(net.named_parameters())
    n = len(batch[0])
    capture, recorded = Capture(parameters), Recorded(examples=n)
    learn_layouts(capture, lambda b: (loss(net, b),), batch, examples=n)
    capture.begin(n, recorded)
    losses = loss(net, batch)
    capture.end([losses])
    losses.sum().backward()
    with Largest() as mode:
        clipped_sum(recorded, parameters, Flat(1.0))
    return mode.elements


def test_no_table_for_each_example_is_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, batch = nn.Sequential(), (torch.randint(4000, (32, T)),)

    class Large(Language):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.table, self.middle = nn.Embedding(4000, 64), nn.Linear(64, 64)
            self.bias, self.factor = None, 1.0

    net = Large()
    assert largest(net, batch, next_token) < 32 * 4000 * 64 // 4
    monkeypatch.setattr(gathered, "_WAYS", tuple(way for way in gathered._WAYS if way is not gathered._of_a_pair))
    assert largest(net, batch, next_token) >= 32 * 4000 * 64 // 4


def test_an_inner_product_that_is_forgotten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rules.embedding._Table
    real = table.inner_products
    monkeypatch.setattr(table, "inner_products", lambda *a: tuple(0 * t for t in real(*a)))
    net, batch = Language().double(), batch_of(4, 3)
    found, expected = door_sum("explicit", net, batch, loss=next_token), reference(net, batch, next_token, Flat(1.0))
    assert relative_error(found, expected) > 1e-6  # a thousand times what the tests above let pass


def test_nan_examples_are_dropped() -> None:
    torch.manual_seed(0)
    net, (ids,) = Language().double(), batch_of(4)

    def spoiled(model: nn.Module, b: tuple[Tensor, ...]) -> Tensor:
        return next_token(model, b) * torch.where(b[0][:, 0] == ids[1, 0], torch.nan, 1.0)

    found = door_sum("explicit", net, (ids,), loss=spoiled)
    rest = (ids[[i for i in range(4) if ids[i, 0] != ids[1, 0]]],)
    assert_exact(found, reference(net, rest, next_token, Flat(1.0)))
