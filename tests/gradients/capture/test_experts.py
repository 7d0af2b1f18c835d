"""Rows that a router sends to experts: their owners follow from the index by which they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError, Flat, UnsupportedModelError
from privet.gradients.capture.owned import OwnedRows
from privet.gradients.rules.grouped import Grouped
from privet.gradients.use import Use, Uses
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, explicit_sum, reference

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")

D, T, E, K = 4, 4, 4, 2


class Sorted(nn.Module):
    """Experts that get their tokens sorted, in one stacked product, as fast mixtures do."""

    def __init__(self, *, wrong: str = "", tables: bool = False) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(D, D), nn.Linear(D, E), nn.Linear(D, 2)
        self.up, self.down = (nn.Parameter(0.5 * torch.randn(E, D, D)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(E, D)) if tables else None
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        tokens = self.first(x).view(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K)
        expert, order = chosen.flatten().sort()
        if self.wrong == "other tokens":
            order = order.roll(1)
        rows = tokens[order // K]
        ends = torch.bincount(expert, minlength=E).cumsum(0).to(torch.int32)
        h = torch._grouped_mm(rows, self.up, offs=ends)
        if self.bias is not None:
            h = h + self.bias[expert]
        h = torch._grouped_mm(h.tanh(), self.down, offs=ends) * weights.flatten()[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        if self.wrong == "not back":
            back = torch.arange(len(order))
        return self.last(h[back].view(len(tokens), K, D).sum(1).view_as(x)).mean(1)


class Looped(nn.Module):
    """Experts that are asked one after the other, each for the tokens that chose it."""

    def __init__(self, *, put: str = "index_add") -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(D, D), nn.Linear(D, E), nn.Linear(D, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.GELU()) for _ in range(E))
        self.put = put

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        tokens = self.first(x).view(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            if self.put == "mask":
                mask = (chosen == e).any(1)
                part = torch.zeros_like(tokens)
                part[mask] = expert(tokens[mask])
                out = out + part
            else:
                place, rank = torch.where(chosen == e)
                rows = tokens[None, place].reshape(-1, D) if self.put == "an axis in front" else tokens[place]
                out.index_add_(0, place, expert(rows) * weights[place, rank, None])
        return self.last(out.view_as(x)).mean(1)


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch).square().sum(1)


def batch_of(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.randn(n, T, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype),)


def seeded(make: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(**options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("put", ["index_add", "mask", "an axis in front"])
def test_experts_in_a_loop_need_no_word(door: str, put: str) -> None:
    net = seeded(Looped, put=put).double()
    for examples in (4, 1):  # as many as positions, features and experts
        first, batch = batch_of(4), batch_of(examples)
        found = door_sum(door, net, first, batch, loss=loss_of, policy=Flat(1e-2))
        assert_exact(found, reference(net, batch, loss_of, Flat(1e-2)))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("tables", [False, True], ids=["", "biases"])
def test_grouped_experts_need_no_word(door: str, tables: bool) -> None:
    net, batch = seeded(Sorted, tables=tables), batch_of(4, torch.float32)
    found = door_sum(door, net, batch, loss=loss_of, policy=Flat(1e-2))
    assert_exact(found, reference(net, batch, loss_of, Flat(1e-2)))


def test_two_passes_agree() -> None:
    net, batch = seeded(Sorted), batch_of(5, torch.float32)
    found = explicit_sum(net, batch, loss=loss_of, policy=Flat(1e-2), passes=2)
    assert_exact(found, reference(net, batch, loss_of, Flat(1e-2)))


@pytest.mark.parametrize(("make", "dtype"), [(Looped, torch.float64), (Sorted, torch.float32)])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(make: Any, dtype: torch.dtype) -> None:
    net, (x,) = seeded(make).to(dtype), batch_of(4, dtype)

    def summed(some: Tensor) -> dict[str, Tensor]:
        return door_sum("explicit", net, (some,), loss=lambda m, b: 1e4 * loss_of(m, b), policy=Flat(1.0))

    without, changed = summed(x[:-1]), torch.cat([x[:-1], 1e3 * x[-1:]])
    assert 0.5 < distance(summed(x), without) <= 1.0 + 1e-4
    assert distance(summed(changed), without) <= 1.0 + 1e-4


@pytest.mark.parametrize("wrong", ["other tokens", "not back"])
def test_tokens_that_come_back_to_others_are_found(wrong: str) -> None:
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum("explicit", seeded(Sorted, wrong=wrong), batch_of(5, torch.float32), loss=loss_of)


def test_owners_that_do_not_follow_the_index_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    of = OwnedRows.of

    def planted(self: OwnedRows, t: object) -> Any:
        found = of(self, t)
        if found is not None and found.rows > 1:
            found.owner = found.owner.sort().values  # as if rows lay by place
        return found

    monkeypatch.setattr(OwnedRows, "of", planted)
    with pytest.raises(CoverageError):
        door_sum("explicit", seeded(Sorted), batch_of(5, torch.float32), loss=loss_of)


@pytest.mark.parametrize("positions", [1, 7, 40])
def test_the_rule_is_autograd_one_example_at_a_time(positions: int) -> None:
    g = torch.Generator().manual_seed(positions)
    x = torch.randn(3, positions, 5, generator=g, dtype=torch.float64)
    gradient = torch.randn(3, positions, 6, generator=g, dtype=torch.float64)
    expert = torch.randint(E, (3, positions), generator=g)
    operation = Grouped(torch._grouped_mm, torch.zeros(E, dtype=torch.int32))
    uses = Uses((Use(operation, "weight", (x, expert), gradient, (E, 5, 6)),))
    weight = torch.randn(E, 5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    rows = torch.stack(
        [
            torch.autograd.grad((torch.einsum("ti,tio->to", a, weight[e]) * b).sum(), weight)[0]
            for a, e, b in zip(x, expert, gradient, strict=True)
        ]
    )
    weights = torch.rand(3, generator=g, dtype=torch.float64)
    norms = uses.rule.squared_norms(uses)
    torch.testing.assert_close(norms, rows.flatten(1).square().sum(1), rtol=1e-9, atol=0.0)
    assert bool((norms >= rows.flatten(1).square().sum(1) * (1 - 1e-12)).all())
    torch.testing.assert_close(uses.rule.per_example(uses), rows)
    torch.testing.assert_close(uses.rule.weighted_sum(uses, weights), torch.einsum("b,beio->eio", weights, rows))


def test_a_product_in_double_precision_is_that_of_each_expert() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, D), (E, D, 3)))
    ends = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    found = Grouped(torch._grouped_mm, ends).forward((x, ends), {"weight": weight})
    expert = torch.tensor([0, 0, 2, 2, 2, 3])
    torch.testing.assert_close(found, torch.einsum("ri,rio->ro", x, weight[expert]))
