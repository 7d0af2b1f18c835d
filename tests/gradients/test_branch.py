"""Derived tensors: their gradients are formed once, and go back to each parameter that they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat
from privet.clipping import PerLayer
from privet.gradients.branch import Branch
from privet.gradients.derived import Derivation, pull_back_rows
from privet.gradients.gathered import gathered
from privet.gradients.rows import row_norms
from privet.gradients.rules import patches
from privet.gradients.rules.patches import Pairing
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Owner, Uses
from privet.gradients.weight_norm import weight_norm_norms
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, reference
from tests.contracts.zoo import squares
from tests.gradients.harness import Loss, captured_sum, recorded_of, trainable
from tests.gradients.rule_cases import ChannelsLast

SIDE = 4  # examples, positions and features: nothing can be told by its size
LOSS: Loss = lambda m, b: squares(m(*b))  # noqa: E731


class Positions(nn.Module):
    """A table, projected by two matrices, as relative positions are; the table is used as it is, too."""

    def __init__(self, *, also: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(SIDE, SIDE))
        self.keys, self.queries = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE, bias=False)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:  # (B, T, F)
        found = (x @ self.keys(self.table).t()).sin() + (x @ (self.queries(self.table) / 2.0).t()).cos()
        return found + F.linear(x, self.table) if self.also else found


class Together(nn.Module):
    """A matrix that is the sum of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(SIDE, SIDE)), nn.Parameter(torch.randn(SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.a + self.b)).sin()


def normed(layer: nn.Module, axis: int) -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(layer, dim=axis), nn.Tanh())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "positions": lambda: Positions(also=False),
    "positions, and the table": lambda: Positions(also=True),
    "a sum": Together,
    "weight norm": lambda: normed(nn.Linear(SIDE, SIDE), 0),
    "weight norm, columns": lambda: normed(nn.Linear(SIDE, SIDE), 1),
    "weight norm, convolution": lambda: normed(nn.Conv1d(SIDE, 5, 3, padding=1), 0),
    "weight norm, few channels": lambda: normed(nn.Conv1d(SIDE, 16, 2), 0),
    "weight norm, places of a kernel": lambda: normed(nn.Conv1d(SIDE, SIDE, 3, groups=2), 2),
}


def batch_of(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return (torch.randn(SIDE, SIDE, SIDE, dtype=dtype),)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_the_reference(name: str, door: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name]().double(), batch_of()
    for policy in (Flat(0.5), PerLayer(0.5)):
        assert_exact(door_sum(door, model, batch, loss=LOSS, policy=policy), reference(model, batch, LOSS, policy))


@pytest.mark.parametrize("limit", ["privet.gradients.branch.ROWS_BYTES", "privet.gradients.derived._SMALL"])
@pytest.mark.parametrize("name", MODELS)
def test_so_it_is_where_rows_are_not_kept_or_go_back_one_by_one(
    name: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, 1)
    torch.manual_seed(0)
    model, batch = MODELS[name]().double(), batch_of()
    for policy in (Flat(0.5), PerLayer(0.5)):
        assert_exact(captured_sum(model, batch, LOSS, policy), reference(model, batch, LOSS, policy))


@pytest.mark.parametrize("name", MODELS)
def test_one_example_more_moves_the_sum_by_the_clip_norm_at_most(name: str) -> None:
    torch.manual_seed(0)
    model, (x,) = MODELS[name](), batch_of(torch.float32)
    without = captured_sum(model, (x[:-1],), LOSS, Flat(0.5))
    for factor in (1.0, 1000.0):
        changed = torch.cat([x[:-1], factor * x[-1:]])
        assert distance(captured_sum(model, (changed,), LOSS, Flat(0.5)), without) <= 0.5 * (1 + 1e-5)


def test_an_example_that_is_not_finite_adds_nothing() -> None:
    torch.manual_seed(0)
    for make in MODELS.values():
        model, (x,) = make().double(), batch_of()
        others = x.clone()
        others[1] = float("nan")
        expected = reference(model, (x[[0, 2, 3]],), LOSS, Flat(0.5))
        assert_exact(captured_sum(model, (others,), LOSS, Flat(0.5)), expected)


def test_gradients_of_a_derived_tensor_are_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Positions(also=False).double(), batch_of()
    recorded = recorded_of(model, batch, LOSS)
    formed: list[Uses] = []
    calls: list[int] = []
    rows, grad = Branch.rows, torch.autograd.grad

    def counted(self: Branch, units: slice) -> Tensor:
        if self._rows is None:
            formed.extend(self.groups)
        return rows(self, units)

    monkeypatch.setattr(Branch, "rows", counted)

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", called)
    clipped_sum(recorded, trainable(model), Flat(0.5))
    assert len(formed) == 2
    assert len(calls) == 4  # for each of the two tensors, all rows at once and the sum


def test_each_parameter_of_a_sum_has_memory_of_its_own() -> None:
    model, batch = Together(), batch_of(torch.float32)
    found = captured_sum(model, batch, LOSS, Flat(0.5))
    assert torch.equal(found["a"], found["b"])
    assert found["a"].data_ptr() != found["b"].data_ptr()  # noise is added in place


def test_rows_that_are_kept_are_masked() -> None:
    model, batch = MODELS["weight norm"]().double(), batch_of()
    found = gathered(recorded_of(model, batch, LOSS), trainable(model), Owner(SIDE))
    dropped, weights = torch.tensor([False, True, False, False]), torch.ones(SIDE, dtype=torch.float64)
    for mine in found.values():
        mine.squared_norms()
        expected = mine.weighted_sum(weights.masked_fill(dropped, 0.0))
        torch.testing.assert_close(mine.masked(dropped).weighted_sum(weights), expected)


# -- weight norm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5), 0), ((4, 3, 5), 2), ((6, 5), 0), ((6, 5), 1)])
def test_norms_of_weight_norm_are_those_of_what_goes_back(
    shape: tuple[int, ...], axis: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=dtype, requires_grad=True)
    g = torch.randn([n if i == axis else 1 for i, n in enumerate(shape)], dtype=dtype, requires_grad=True)
    derivation = Derivation("w", torch._weight_norm(v, g, axis), ("v", "g"), isometric=False)
    rows = torch.randn(7, *shape, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        for given in (rows, rows.transpose(1, -1).contiguous().transpose(1, -1)):
            for parameters in ([v, g], [g, v]):
                found = weight_norm_norms(derivation, parameters, given)
                assert found is not None
                for norms, back in zip(found, pull_back_rows(derivation, parameters, given), strict=True):
                    torch.testing.assert_close(norms, row_norms(back), rtol=tolerance, atol=0.0)
                    assert bool((norms >= row_norms(back)).all())


def test_norms_of_weight_norm_are_never_too_small_where_they_cancel() -> None:
    """A gradient along v goes back to g alone; what is left for v is rounding."""
    torch.manual_seed(0)
    v, g = torch.randn(1, 700, requires_grad=True), torch.full((1, 1), 5.0, requires_grad=True)
    derivation = Derivation("w", torch._weight_norm(v, g, 0), ("v", "g"), isometric=False)
    rows = v.detach() + 10.0 ** torch.linspace(-5, -2, 300)[:, None, None] * torch.randn(300, 1, 700)
    with torch.no_grad():
        found = weight_norm_norms(derivation, [v, g], rows)
    exact = Derivation("w", torch._weight_norm(v.double(), g.double(), 0), ("v", "g"), isometric=False)
    assert found is not None
    for norms, back in zip(found, pull_back_rows(exact, [v, g], rows.double()), strict=True):
        assert bool((norms >= row_norms(back.double())).all())


def test_weight_norm_of_a_derived_tensor_goes_back_by_autograd() -> None:
    v, g = torch.randn(4, 3, requires_grad=True), torch.ones(4, 1, requires_grad=True)
    derivation = Derivation("w", torch._weight_norm(2.0 * v, g, 0), ("v", "g"), isometric=False)
    assert weight_norm_norms(derivation, [v, g], torch.randn(2, 4, 3)) is None


# -- kernels of single channels --------------------------------------------------------------------------------------

ALONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one axis": (lambda: nn.Conv1d(4, 4, 16, groups=4, padding=7), (4, 9)),
    "strides and holes": (lambda: nn.Conv2d(4, 4, (4, 5), (2, 1), (3, 6), (1, 3), groups=4), (4, 6, 7)),
    "as many rows as channels and places": (lambda: nn.Conv2d(5, 5, 5, groups=5, padding=2), (5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 4, 2, 1, groups=4), (4, 3, 5)),
    "three axes": (lambda: nn.Conv3d(4, 4, (2, 3, 3), groups=4, padding=1), (4, 2, 4, 3)),
    "channels last": (lambda: ChannelsLast(nn.Conv2d(4, 4, 4, groups=4)), (4, 6, 5)),
}


@pytest.mark.parametrize("step", [1, 2**16])
@pytest.mark.parametrize("name", ALONE)
def test_kernels_of_single_channels_are_exact(name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.gradients.rules.patches._ALONE", (1, step))
    added: list[Pairing] = []
    add_up = patches._added_up

    def counted(pairing: Pairing) -> Tensor:
        added.append(pairing)
        return add_up(pairing)

    monkeypatch.setattr(patches, "_added_up", counted)
    torch.manual_seed(0)
    make, shape = ALONE[name]
    model, x = nn.Sequential(make(), nn.Tanh()).double(), torch.randn(5, *shape, dtype=torch.float64)
    expected = reference(model, (x,), LOSS, Flat(0.5))
    for door in DOORS:
        assert_exact(door_sum(door, model, (x,), loss=LOSS, policy=Flat(0.5)), expected)
    assert added
    model, x = model.float(), x.float()
    without = captured_sum(model, (x[:-1],), LOSS, Flat(0.5))
    changed = torch.cat([x[:-1], 1000.0 * x[-1:]])
    assert distance(captured_sum(model, (changed,), LOSS, Flat(0.5)), without) <= 0.5 * (1 + 1e-5)


def test_other_kernels_are_products() -> None:
    x, g = torch.randn(16, 32, 8, 8), torch.randn(16, 32, 8, 8)
    by_place = {k: Pairing(x, g, (k, k), (1, 1), (k // 2,) * 2, (1, 1), 32).place_by_place for k in (3, 5)}
    assert by_place == {3: False, 5: True}
    assert not Pairing(x, torch.randn(16, 64, 8, 8), (5, 5), (1, 1), (2, 2), (1, 1), 32).place_by_place
    assert F.conv2d(x, torch.randn(32, 1, 5, 5), padding=2, groups=32).shape == g.shape
