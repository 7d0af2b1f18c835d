"""No noise: one example more moves the clipped sum by at most the clip norm, whatever the gradients' size.

The stated summation error is about `B u` of the terms, u = 6e-8 in float32; at B = 6 that is below 1e-6 of the norm.
"""

from __future__ import annotations

import math

import pytest
import torch

from privet.clipping import Flat, PerLayer
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import learn_layouts
from privet.gradients.summation import clipped_sum
from privet.gradients.use import Recorded
from tests.gradients.harness import trainable
from tests.gradients.policies import policies
from tests.gradients.rule_cases import CASES, Case, loss

SIZE = 6
BOUND = 1e-3  # below every norm that is not scaled down
POLICIES = (Flat(BOUND), PerLayer(BOUND))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(threads)


class Watched:
    """A module whose layouts are learned once, and recorded many times."""

    def __init__(self, module, batch) -> None:
        self.module, self.capture = module, Capture(trainable(module))
        self.told = {}
        self.learn(batch)

    def learn(self, batch) -> None:
        """Learns where the examples are in the batch of so many, for entries of flat bags are moved along it."""
        size = len(batch[0])
        if size not in self.told:
            run = lambda b: (loss(self.module, b),)  # noqa: E731
            self.told[size] = learn_layouts(self.capture, run, batch, examples=size)
        self.capture.tell(self.told[size])

    def sums(self, batch, factors, policies=POLICIES):
        self.learn(batch)
        recorded = Recorded(examples=len(factors))
        self.capture.begin(len(factors), recorded)
        losses = loss(self.module, batch)
        self.capture.end()
        (losses * factors).sum().backward()
        return [clipped_sum(recorded, trainable(self.module), policy) for policy in policies]


def distance(first, second) -> float:
    first, second = first.values, second.values
    return math.sqrt(sum(float((first[n].double() - second[n].double()).square().sum()) for n in first))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(case: Case):
    batch = case.inputs(SIZE, torch.float32)
    watched = Watched(case.module(), batch)
    without = watched.sums(tuple(t[:-1] for t in batch), torch.ones(SIZE - 1))
    for scale in (1e-15, 1.0, 1e15):
        factors = torch.ones(SIZE)
        factors[-1] = scale
        for policy, more, less in zip(POLICIES, watched.sums(batch, factors), without, strict=True):
            moved = distance(more, less)
            assert moved <= policy.sensitivity * (1 + 1e-6) + SIZE * 6e-8 * BOUND * SIZE, (policy, scale)
            if scale >= 1.0 and not more.statistics["dropped"]:
                assert moved > 0.3 * policy.sensitivity, "the example is not in the sum at all"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_example_whose_gradient_is_not_finite_weighs_nothing(case: Case):
    batch = case.inputs(3, torch.float32)
    module = case.module()
    watched, chosen = Watched(module, batch), tuple(policies(module, BOUND).values())
    kept = torch.tensor([0, 2])
    expected = watched.sums(tuple(t[kept] for t in batch), torch.ones(2), chosen)
    for value in (math.nan, math.inf, -math.inf, 1e38):
        sums = watched.sums(batch, torch.tensor([1.0, value, 1.0]), chosen)
        for policy, found, without in zip(chosen, sums, expected, strict=True):
            assert all(v.isfinite().all() for v in found.values.values()), policy
            assert found.statistics["dropped"] == 1 or math.isfinite(value), policy
            moved = 1e-5 * BOUND if found.statistics["dropped"] else policy.sensitivity * (1 + 1e-5)
            assert distance(found, without) <= moved, policy
    if batch[0].is_floating_point():
        spoilt = tuple(t.index_fill(0, torch.tensor([1]), math.nan) for t in batch)
        for policy, found, without in zip(chosen, watched.sums(spoilt, torch.ones(3), chosen), expected, strict=True):
            assert found.statistics["dropped"] == 1, policy
            assert distance(found, without) <= 1e-5 * BOUND, policy
