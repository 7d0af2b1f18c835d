"""Groups of the user's own: their bounds, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from privet import ConfigurationError
from privet.clipping import GroupWise

NAMES = ["a", "b", "c"]
POLICY = GroupWise({"x": 3.0, "y": 4.0}, {"y": ["b"], "x": ["c", "a"]})


def test_bounds_follow_their_groups() -> None:
    assert list(POLICY.groups(NAMES)) == [0, 1, 0]
    assert POLICY.sensitivity == 5.0
    values = torch.cat([torch.zeros(1), torch.logspace(-44, 38, 101)])
    squared = torch.cartesian_prod(values, values).t().contiguous()
    weights = POLICY.weights(squared)
    added = (weights.double().square() * squared.double()).sum(0).sqrt()
    assert 4.9999 <= float(added.max()) <= 5.0
    assert POLICY.weights(torch.tensor([[math.inf], [1e-45]])).tolist() == [[0.0], [1.0]]
    assert bool(POLICY.weights(torch.tensor([[math.nan], [0.0]]))[0].isnan().all()), "never taken for a number"


@pytest.mark.parametrize(
    ("bounds", "members"),
    [
        ({}, {}),
        ({"x": 1.0}, {"y": ["a"]}),
        ({"x": 1.0}, {"x": []}),
        ({"x": 1.0, "y": 1.0}, {"x": ["a"], "y": ["a"]}),
        *(({"x": bad}, {"x": ["a"]}) for bad in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_groups_that_bound_nothing_are_refused(bounds: Any, members: Any) -> None:
    with pytest.raises(ConfigurationError):
        GroupWise(bounds, members)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"]])
def test_every_parameter_has_one_group(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="Expected each trainable"):
        POLICY.groups(names)
