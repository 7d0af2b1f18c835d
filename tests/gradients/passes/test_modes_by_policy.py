"""Every mode x policy x rule: the clipped sum is the reference's, and one example moves it by the sensitivity at most.

The rows are those of `rule_cases.py`, the columns those of `policies.py`. A mode is run once for a row, and clipped by
every policy. The doors on top of the modes have tests of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet.clipping import ClippingPolicy
from privet.errors import ConfigurationError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.coverage import learn_layouts
from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.layout import Told
from privet.gradients.passes.two_pass import TwoPass
from privet.gradients.reference import example_gradients
from privet.gradients.summation import clipped_sum, per_example_gradients
from privet.gradients.use import Recorded
from privet.training.materialised import clipped_rows
from tests.contracts.doors import expected_sum, relative_error
from tests.gradients.harness import trainable
from tests.gradients.policies import policies, weights_an_example
from tests.gradients.rule_cases import CASES, Case, loss

MODES = ("auto", "hooks", "functorch", "two passes")
SIZE = 4
BOUND = 1e-3  # below every norm that is not scaled down

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(threads)


class Watched:
    """A module in one mode, whose layouts are learned once, and whose batches are clipped by many policies."""

    def __init__(self, mode: str, module: nn.Module, batch: tuple[Tensor, ...]) -> None:
        self.mode, self.module = mode, module
        self.capture = Capture(trainable(module), mapped=mode == "functorch")
        self.told: dict[int, Told] = {}
        self.learn(batch, SIZE)
        self.two_pass = TwoPass(self.capture)

    def learn(self, batch: tuple[Tensor, ...], examples: int) -> None:
        """Learns where the examples are in the batch of so many, for entries of flat bags are moved along it."""
        if examples not in self.told:
            self.told[examples] = learn_layouts(
                self.capture, lambda b: (loss(self.module, b),), batch, examples=examples
            )
        self.capture.tell(self.told[examples])

    def sums(
        self, batch: tuple[Tensor, ...], factors: Tensor, chosen: dict[str, ClippingPolicy]
    ) -> dict[str, ClippedSum]:
        parameters, n = trainable(self.module), len(factors)
        self.learn(batch, n)
        if self.mode == "two passes":

            def run(policy: ClippingPolicy) -> ClippedSum:
                return self.two_pass.clipped_sum(
                    lambda b: loss(self.module, b) * factors, batch, examples=n, parameters=parameters, policy=policy
                )[0]

            return {name: run(policy) for name, policy in chosen.items()}
        recorded = Recorded(examples=n)
        self.capture.begin(n, recorded)
        losses = loss(self.module, batch) * factors
        self.capture.end()
        losses.sum().backward()
        if self.mode == "auto":
            return {name: clipped_sum(recorded, parameters, policy) for name, policy in chosen.items()}
        rows = per_example_gradients(recorded, parameters)
        rows = {name: rows[name].view(n, *p.shape) for name, p in parameters.items()}
        return {name: clipped_rows(rows, parameters, policy) for name, policy in chosen.items()}


def allowed(mode: str, module: nn.Module, bound: float) -> dict[str, ClippingPolicy]:
    """Returns the policies that the mode takes; of the others, that it refuses them."""
    found = policies(module, bound)
    if mode != "two passes":
        return found
    several = {name: policy for name, policy in found.items() if weights_an_example(policy, module) > 1}
    for policy in several.values():
        with pytest.raises(ConfigurationError, match="weighs each example once"):
            TwoPass(Capture({})).clipped_sum(
                lambda _: torch.zeros(1), (), examples=1, parameters=trainable(module), policy=policy
            )
    return {name: policy for name, policy in found.items() if name not in several}


def distance(first: ClippedSum, second: ClippedSum) -> float:
    a, b = first.values, second.values
    return math.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in a))


def pairs(odd: int) -> list[Any]:
    """Returns every case with every mode; half of them, each case and each mode often, are run ordinarily."""
    return [
        pytest.param(case, mode, id=f"{case}-{mode}", marks=[pytest.mark.deep] if (i + j) % 2 == odd else [])
        for i, case in enumerate(CASES)
        for j, mode in enumerate(MODES)
        if mode != "functorch" or case.mapped
    ]


@pytest.mark.parametrize(("case", "mode"), pairs(0))
def test_the_clipped_sum_is_the_reference(case: Case, mode: str) -> None:
    """In float64: the rules in float32 are compared in `test_rules_reference.py`, and bounded in float32 below."""
    module, batch = case.module().double(), case.inputs(SIZE, torch.float64)
    examples = [tuple(t[i : i + 1] for t in batch) for i in range(SIZE)]
    gradients = example_gradients(module, examples, lambda m, b: loss(m, b).sum())
    watched = Watched(mode, module, batch)
    for bound in (0.1, 1e6):
        chosen = allowed(mode, module, bound)
        found = watched.sums(batch, torch.ones(SIZE, dtype=torch.float64), chosen)
        for name, policy in chosen.items():
            error = relative_error(found[name].values, expected_sum(gradients, policy))
            assert error < 1e-9, f"{name}, {bound}: {error}"


@pytest.mark.parametrize(("case", "mode"), pairs(1))
def test_one_example_moves_the_sum_by_the_sensitivity_at_most(case: Case, mode: str) -> None:
    module, batch = case.module(), case.inputs(SIZE, torch.float32)
    watched, chosen = Watched(mode, module, batch), allowed(mode, module, BOUND)
    without = watched.sums(tuple(t[:-1] for t in batch), torch.ones(SIZE - 1), chosen)
    rounding = SIZE * 6e-8 * SIZE * BOUND  # as the docs state it: B u of the terms' sizes
    for scale in (1e-15, 1.0, 1e15, math.inf, math.nan):
        factors = torch.ones(SIZE).index_fill(0, torch.tensor([SIZE - 1]), scale)
        more = watched.sums(batch, factors, chosen)
        for name, policy in chosen.items():
            dropped = int(more[name].statistics["dropped"])
            moved = distance(more[name], without[name])
            assert moved <= policy.sensitivity * (1 + 1e-6) + rounding, (name, scale)
            if dropped:
                assert moved <= 1e-5 * BOUND, (name, scale)  # nothing, but for the rounding of another shape
            else:
                assert math.isfinite(scale), (name, scale)
                assert scale < 1.0 or moved > 0.05 * policy.sensitivity, (name, scale, "the example is not in the sum")


@pytest.mark.parametrize("mode", MODES)
def test_the_tests_above_see_a_policy_that_clips_to_twice_its_bound(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = nn.Linear(3, 2), (torch.randn(SIZE, 3),)
    watched, chosen = Watched(mode, module, batch), allowed(mode, module, BOUND)
    for policy in chosen.values():
        honest = type(policy).weights
        monkeypatch.setattr(type(policy), "weights", lambda self, n, honest=honest: 2.0 * honest(self, n))
    without = watched.sums((batch[0][:-1],), torch.ones(SIZE - 1), chosen)
    more = watched.sums(batch, torch.tensor([1.0] * (SIZE - 1) + [1e15]), chosen)
    assert {"flat", "automatic", "psac"} <= set(chosen)
    for name, policy in chosen.items():
        assert distance(more[name], without[name]) > 1.9 * policy.sensitivity, name
