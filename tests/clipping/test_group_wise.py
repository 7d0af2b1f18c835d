"""Groups of the user's own: their bounds, and what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

from privet import ConfigurationError, Gaussian, Mechanism, Poisson
from privet.clipping import ClippingPolicy, GroupWise, PerLayer
from privet.schedules import Listed, Plan

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


@pytest.mark.parametrize("policy", [POLICY, PerLayer({"a": 1.0, "b": 2.0}), PerLayer(1.0)], ids=str)
def test_a_policy_goes_to_other_processes_and_stays_frozen_there(policy: ClippingPolicy) -> None:
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin == policy
        assert twin.sensitivity == policy.sensitivity
        assert repr(twin) == repr(policy)


def test_a_schedule_changes_the_bound_of_every_group() -> None:
    mechanism = Mechanism(sampling=Poisson(0.1), clipping=POLICY, noise=Gaussian(1.0), steps=4)
    plan = Plan(mechanism, clip_norm=Listed((1.0, 0.5)), every=2)
    assert plan.at(1).clipping == GroupWise({"x": 1.5, "y": 2.0}, POLICY.members)
    assert plan.at(1).clipping.sensitivity == 2.5


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"]])
def test_every_parameter_has_one_group(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="Expected each trainable"):
        POLICY.groups(names)
