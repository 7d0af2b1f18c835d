"""Two views of each example in one call, in a compiled step: exact as long as nothing is cut out of the joined rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import Flat
from privet.errors import UnsupportedModelError
from tests.contracts.doors import assert_exact, reference
from tests.gradients.passes.compiled.graphs import sums_of

D = 4


class Views(nn.Module):
    """A tower that sees both views as one batch, `cut` by chunk or taken apart by a view."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.tower, self.last, self.cut = nn.Linear(D, D), nn.Linear(D, D), cut

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        rows = self.tower(torch.cat([a, b])).tanh()
        first, second = rows.chunk(2) if self.cut else rows.view(2, -1, D).unbind(0)
        return self.last(first * second)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch).square().sum(1)


def made(*, cut: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Views(cut=cut).double(), (torch.randn(D, D).double(), torch.randn(D, D).double())


def test_views_that_are_taken_apart_by_a_view_are_exact_in_a_graph(graphs: list[Any]) -> None:
    model, batch = made(cut=False)
    found = sums_of(model, batch, batch, loss=loss, policy=Flat(1.0), size=D + 2)  # two of them stand for none
    assert graphs
    assert_exact(found[-1], reference(model, batch, loss, Flat(1.0)))


def test_views_that_are_cut_out_of_the_joined_rows_are_refused(graphs: list[Any]) -> None:
    model, batch = made(cut=True)
    with pytest.raises(UnsupportedModelError, match="moved along the batch by chunk"):
        sums_of(model, batch, loss=loss, policy=Flat(1.0), size=D)
