"""The norm of one example's bag does not depend on how long the bags of others are."""

from __future__ import annotations

import torch
from torch import nn

from privet.clipping import Flat
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import learn_layouts
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded
from tests.gradients.harness import trainable

BOUND, SHORT, LONG = 1e-3, 4, 20_000


def summed(module: nn.EmbeddingBag, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    capture, recorded = Capture(trainable(module)), Recorded(examples=len(ids))
    learn_layouts(capture, lambda b: (module(b[0], per_sample_weights=b[1]).sum(1),), (ids, weights), examples=len(ids))
    capture.begin(len(ids), recorded)
    losses = module(ids, per_sample_weights=weights).sum(1)
    capture.end()
    losses.sum().backward()
    return clipped_sum(recorded, trainable(module), Flat(BOUND)).values["weight"].double()


def test_one_long_bag_does_not_lower_the_weights_of_others():
    torch.manual_seed(0)
    module, others = nn.EmbeddingBag(50, 3, mode="sum"), 40
    ids = torch.randint(50, (others + 1, LONG))
    weights = torch.zeros(others + 1, LONG)
    weights[:, :SHORT] = 1.0
    without = summed(module, ids[:-1, :SHORT], weights[:-1, :SHORT])
    # The example that comes adds next to nothing itself: what moves is the sum of the others.
    weights[-1] = 1e-12
    moved = float((summed(module, ids, weights) - without).norm())
    assert moved < 1e-3 * BOUND
