"""The rule on the page for those who write rules: it runs, it is used, and it is right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import CoverageError, Flat, PerLayer
from privet.gradients.rules import registry
from scripts.run_snippets import snippets
from tests.contracts.doors import DOORS, assert_exact, door_sum, reference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "contributing_rules.md"


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """Registers the page's rule for one test, and yields what the page defines."""
    before = dict(registry._HANDLERS)
    names: dict[str, Any] = {"__name__": "rule_of_the_page"}
    for snippet in snippets(PAGE.read_text(encoding="utf-8")):
        exec(snippet.code, names)
    yield names
    registry._HANDLERS.clear()
    registry._HANDLERS.update(before)


class Heads(nn.Module):
    """Matrices used once, or twice; with a head that meets the batch merged with positions."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.weight, self.times = nn.Parameter(torch.randn(3, 4, 4)), times

    def forward(self, x: Tensor) -> Tensor:  # (B, T, H, I)
        h = x.flatten(0, 1)
        for _ in range(self.times):
            h = torch.tanh(torch.einsum("bhi,hio->bho", h, self.weight))
        return h.view(x.shape)


def loss(module: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return module(batch[0]).pow(3).flatten(1).sum(1)


def batch_of(examples: int, positions: int) -> tuple[Tensor]:
    return (torch.randn(examples, positions, 3, 4, dtype=torch.float64),)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("positions", [1, 5])
def test_the_rule_on_the_page_is_used_and_right(
    page: dict[str, Any], door: str, times: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    rule, real = page["_Matrices"], page["_Matrices"].weighted_sum
    monkeypatch.setattr(rule, "weighted_sum", lambda self, *rest: (used.append(1), real(self, *rest))[1])
    net, batch = Heads(times).double(), batch_of(5, positions)
    for policy in (Flat(0.3), PerLayer(0.3)):
        expected = reference(net, batch, loss, policy)
        assert_exact(door_sum(door, net, batch, loss=loss, policy=policy), expected)
    assert used


def test_its_norms_are_those_of_its_gradients(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rule = page["_Matrices"]
    real = rule.squared_norms
    monkeypatch.setattr(rule, "squared_norms", lambda self, uses: real(self, uses) / 4)
    net, batch = Heads(1).double(), batch_of(5, 1)
    with pytest.raises(AssertionError):
        assert_exact(
            door_sum("explicit", net, batch, loss=loss, policy=Flat(0.3)), reference(net, batch, loss, Flat(0.3))
        )


def test_a_mistake_in_it_is_caught_on_the_first_batch(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rule = page["_Matrices"]
    real = rule.weighted_sum
    monkeypatch.setattr(rule, "weighted_sum", lambda self, uses, weights: real(self, uses, weights).flip(0))
    with pytest.raises(CoverageError, match="weight"):
        door_sum("explicit", Heads(1).double(), batch_of(5, 1), loss=loss)


def test_other_equations_still_go_another_way(page: dict[str, Any]) -> None:
    class Other(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bthi,hio->btho", x, self.weight)

    net, batch = Other(1).double(), batch_of(4, 2)
    assert_exact(door_sum("explicit", net, batch, loss=loss, policy=Flat(0.3)), reference(net, batch, loss, Flat(0.3)))


def test_the_example_is_short(page: dict[str, Any]) -> None:
    (snippet,) = snippets(PAGE.read_text(encoding="utf-8"))
    code = [line for line in snippet.code.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(code) <= 35


def test_one_line_registers_a_family() -> None:
    from privet.gradients import rules

    source = inspect.getsource(rules)
    for family in ("linear", "embedding", "normalization"):
        assert len(re.findall(rf"\b{family}\b", source)) == 1
