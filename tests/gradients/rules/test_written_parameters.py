"""A parameter that is written into data where the rule cannot follow it is refused, and not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import Flat, UnsupportedModelError
from tests.contracts.doors import door_sum

PLACES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "a truth value, which chooses a copy": ((slice(None), True), (3,)),
    "rows by their numbers": (torch.tensor([0, 1]), (3,)),
    "more axes than the place has": ((slice(None), 0), (1, 1, 3)),
    "one example alone": ((0, 0), (3,)),
}


class Written(nn.Module):
    def __init__(self, index: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.index, self.value = index, nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 1.0
        hidden[self.index] = self.value
        return hidden.flatten(1)


@pytest.mark.parametrize("door", ["paper", "explicit"])
@pytest.mark.parametrize("what", PLACES)
def test_it_is_refused(what: str, door: str) -> None:
    model, batch = Written(*PLACES[what]), (torch.randn(4, 2, 3, dtype=torch.float64),)
    with pytest.raises(UnsupportedModelError):
        door_sum(door, model, batch, loss=lambda m, b: m(b[0]).square().sum(1), policy=Flat(1.0))
