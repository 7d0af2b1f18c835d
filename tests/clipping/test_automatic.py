"""Policies that normalise: their formula, their sensitivity under search, and their edge cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from privet import ConfigurationError
from privet.clipping import PSAC, Automatic

KINDS = [Automatic, PSAC]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stability", [1e-12, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("clip_norm", [1e-5, 0.7, 3e5])
def test_no_norm_moves_the_sum_further_than_the_sensitivity(
    kind: Any, dtype: torch.dtype, stability: float, clip_norm: float
) -> None:
    policy = kind(clip_norm, stability)
    squared = torch.cat([torch.zeros(1), torch.logspace(-44, 38, 20001)]).to(dtype)[None]
    weights = policy.weights(squared)
    assert bool((weights.isfinite() & (weights >= 0)).all())
    added = weights.double() * squared.double().sqrt()
    assert float(added.max()) <= policy.sensitivity
    assert float(added.max()) >= 0.99999 * policy.sensitivity, "the bound is tight"


def test_the_weights_are_the_papers() -> None:
    squared = torch.tensor([[0.0, 4.0]], dtype=torch.float64)
    assert Automatic(3.0, 0.5).weights(squared)[0].tolist() == pytest.approx([6.0, 1.2])
    assert PSAC(3.0, 0.5).weights(squared)[0].tolist() == pytest.approx([3.0, 3.0 / 2.2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_underflow_overflow_or_are_no_number(kind: Any) -> None:
    policy = kind(1.0)
    gradients = torch.tensor([0.0, 1e-45, 1e38, math.inf, math.nan])
    squared = gradients.square()[None]  # 1e38 overflows: the caller drops it
    weights = policy.weights(squared)[0]
    assert bool(weights[:2].isfinite().all())
    assert float(weights[1] * gradients[1]) <= 1.0
    assert weights[2:4].tolist() == [0.0, 0.0]
    assert bool(weights[4].isnan()), "never taken for a number"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, True])
def test_what_bounds_nothing_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="clip_norm"):
        kind(value)
    with pytest.raises(ConfigurationError, match="stability"):
        kind(1.0, value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stability_that_magnifies_without_bound_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="stability"):
        kind(1.0, 1e-13)
