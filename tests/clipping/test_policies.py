"""Policies: their sensitivity, their edge cases, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet import ConfigurationError
from privet.clipping import ClippingPolicy, Flat, PerLayer

NAMES = ["a.weight", "a.bias", "b.c.weight", "scale"]
norms = st.floats(0.0, 2.0**127, allow_subnormal=True, width=32)


def contributed(policy: ClippingPolicy, squared: torch.Tensor) -> torch.Tensor:
    """Returns the norm of what each example adds to the sum, in float64."""
    weights = policy.weights(squared)
    assert weights.shape == squared.shape
    assert bool(weights.isfinite().all())
    assert bool((weights >= 0).all())
    return (weights.double().square() * squared.double()).sum(0).sqrt()


@settings(deadline=None, max_examples=100)
@given(st.lists(norms, min_size=1, max_size=8), st.floats(1e-6, 1e6))
def test_flat_bounds_every_example(values: list[float], clip_norm: float) -> None:
    policy = Flat(clip_norm)
    added = contributed(policy, torch.tensor([values], dtype=torch.float32))
    assert bool((added <= policy.sensitivity * (1 + 1e-7)).all())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(norms, norms, norms), min_size=1, max_size=8), st.floats(1e-6, 1e6), st.booleans())
def test_per_layer_bounds_every_example(values: list[tuple[float, ...]], clip_norm: float, mapped: bool) -> None:
    policy = PerLayer({"a": clip_norm, "b.c": 2 * clip_norm, "": 0.5 * clip_norm} if mapped else clip_norm)
    assert max(policy.groups(NAMES)) == 2
    added = contributed(policy, torch.tensor(values, dtype=torch.float32).t().contiguous())
    assert bool((added <= policy.sensitivity * (1 + 1e-7)).all())


def test_an_example_within_the_bound_is_left_alone() -> None:
    assert torch.equal(Flat(2.0).weights(torch.tensor([[0.0, 1.0, 3.9, 1e-45]])), torch.ones(1, 4))


def test_an_example_beyond_the_bound_is_scaled_to_it() -> None:
    squared = torch.tensor([[16.0, 1e30]])
    added = contributed(Flat(2.0), squared)
    assert torch.allclose(added, torch.full((2,), 2.0, dtype=torch.float64), rtol=1e-6)
    assert bool((added <= 2.0).all()), "rounded down, never up"


def test_one_number_for_all_layers_is_the_bound_of_the_whole() -> None:
    policy = PerLayer(3.0)
    assert policy.sensitivity == 3.0
    added = contributed(policy, torch.full((9, 1), 1e6))
    assert float(added) == pytest.approx(3.0, rel=1e-6)


def test_a_bound_for_each_layer_adds_up_in_squares() -> None:
    assert PerLayer({"a": 3.0, "b.c": 4.0}).sensitivity == 5.0


def test_layers_keep_their_own_bounds_in_any_order() -> None:
    policy = PerLayer({"": 1.0, "b.c": 2.0, "a": 3.0})
    assert list(policy.groups(NAMES)) == [2, 2, 1, 0]
    weights = policy.weights(torch.full((3, 1), 100.0))
    assert torch.allclose(weights * 10, torch.tensor([[1.0], [2.0], [3.0]]), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, True])
@pytest.mark.parametrize("kind", [Flat, PerLayer, lambda c: PerLayer({"a": c})], ids=["flat", "per layer", "mapping"])
def test_a_clip_norm_that_bounds_nothing_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="clip_norm"):
        kind(value)


@pytest.mark.parametrize("bounds", [{}, {"a": 1.0}, {"a": 1.0, "b.c": 1.0, "": 1.0, "d": 1.0}])
def test_bounds_for_other_layers_than_the_models_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)no layer|Expected exactly"):
        PerLayer(bounds).groups(NAMES)


def test_policies_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Flat(1.0).clip_norm = 2.0  # type: ignore[misc]
    bounds = {"a": 1.0}
    policy = PerLayer(bounds)
    bounds["a"] = 100.0
    assert policy.sensitivity == 1.0
    with pytest.raises(TypeError):
        policy.clip_norm["a"] = 2.0  # type: ignore[index]
