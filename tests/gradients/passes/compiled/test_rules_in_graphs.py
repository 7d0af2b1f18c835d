"""Every rule, every way to use a parameter and every policy in a graph: the sum of the reference, from one graph."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat, UnsupportedModelError
from privet.clipping import ClippingPolicy
from privet.errors import ConfigurationError
from privet.gradients import gathered
from privet.gradients.passes.compiled import CompiledSum
from privet.gradients.rules.pool import free_idle, scratch
from privet.gradients.tracing import traced, tracing
from tests.contracts.doors import assert_exact, distance, reference, size
from tests.contracts.zoo import ZOO, batch_of, model_of, plain
from tests.gradients.passes.compiled.graphs import step_of, sums_of
from tests.gradients.policies import POLICIES
from tests.gradients.rule_cases import CASES, Case
from tests.gradients.rule_cases import loss as case_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
]


UNEVEN = [case for case in CASES if "offset" in str(case) or "packed" in str(case)]  # whose lengths are values


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_what_has_lengths_that_are_values_is_no_graph(case: Case, graphs):
    with pytest.raises(UnsupportedModelError, match=r"pad the bags|moved along the batch|packs sequences"):
        list(sums_of(case.module().double(), case.inputs(3, torch.float64), size=3))


# Two of three rules; the rest with the deep tests.
MOST = [
    pytest.param(case, id=str(case), marks=[pytest.mark.deep] if i % 3 == 2 else [])
    for i, case in enumerate(case for case in CASES if case not in UNEVEN)
]


@pytest.mark.parametrize("case", MOST)
def test_every_rule_gives_the_sum_of_the_reference_in_a_graph(case: Case, graphs):
    module = case.module().double()
    batches = [case.inputs(n, torch.float64) for n in (3, 4)]
    for batch, found in zip(batches, sums_of(module, *batches, size=3), strict=True):
        assert_exact(found, reference(module, batch, case_loss, Flat(0.1)))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ZOO)
def test_every_way_to_use_a_parameter_gives_the_sum_of_the_reference_in_a_graph(name, graphs):
    model, loss = model_of(name), ZOO[name].loss
    batches = [batch_of(name, n, seed=n) for n in (5, 1, 7)]
    for batch, found in zip(batches, sums_of(model, *batches, loss=loss, policy=Flat(0.7)), strict=True):
        assert_exact(found, reference(plain(model), batch, loss, Flat(0.7)))
    assert len(graphs) == 1


# Attention takes ten seconds with each policy: the two that differ most stand for the others.
WAYS = [("in place", policy) for policy in POLICIES] + [("embedding tied to the output", policy) for policy in POLICIES]
WAYS += [("attention", policy) for policy in ("flat", "group-wise")]
REST = [pytest.param("attention", p, marks=pytest.mark.deep) for p in POLICIES if ("attention", p) not in WAYS]


@pytest.mark.parametrize(("name", "policy"), WAYS + REST)
def test_every_policy_gives_the_sum_of_the_reference_in_a_graph(name, policy, graphs):
    model, loss = model_of(name), ZOO[name].loss
    bound = POLICIES[policy](plain(model), 0.3)
    for n in (5, 3, 6):
        (found,) = sums_of(model, batch_of(name, n), loss=loss, policy=bound)
        assert_exact(found, reference(plain(model), batch_of(name, n), loss, bound))


@pytest.mark.parametrize("policy", POLICIES)
def test_one_example_moves_the_sum_of_a_graph_by_at_most_the_sensitivity(policy, graphs):
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    bound = POLICIES[policy](net, 0.5)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return module(batch[0]).square().sum(1) * batch[1]

    step = step_of(net, loss=loss, policy=bound, size=4)
    for poison in (math.nan, math.inf, -math.inf, 1e38):
        x, factors = torch.randn(7, 6), torch.tensor([1.0, 1e6, 0.0, 1e-30, poison, 1.0, 1e30])
        whole, losses = _sum_of(step, (x, factors))
        assert len(losses) == 7
        for left in range(7):
            rest = torch.arange(7) != left
            less, _ = _sum_of(step, (x[rest], factors[rest]))
            assert all(bool(t.isfinite().all()) for t in less.values())
            assert distance(whole, less) <= bound.sensitivity * (1 + 1e-5) + 1e-6
        assert size(whole) > 0.4 * bound.sensitivity
    assert len(graphs) == 1


def _sum_of(step, batch):
    losses, clipped = step._summed(batch, len(batch[0]))
    return dict(clipped.take()), losses


def test_the_bound_above_would_catch_a_graph_that_lets_values_through(graphs, monkeypatch):
    net, batch = nn.Linear(2, 1), (torch.tensor([[1.0, 2.0], [math.nan, 1.0]]),)
    monkeypatch.setattr(gathered.Gathered, "masked", lambda self, dropped: self)
    monkeypatch.setattr(CompiledSum, "_try", lambda *rest: True)  # which finds it too
    (found,) = sums_of(net, batch, loss=lambda m, b: m(b[0]).sum(1))
    assert not bool(found["weight"].isfinite().all())


def test_dropped_examples_are_counted_and_those_that_fill_up_are_not(graphs):
    net = nn.Linear(2, 1)
    step = step_of(net, loss=lambda m, b: (m(b[0]) / b[0].sum(1, keepdim=True)).sum(1), size=4)
    x = torch.tensor([[1.0, 2.0], [math.nan, 1.0], [3.0, 1.0]])
    step((x,))
    losses, clipped = step._summed((x,), 3)
    assert int(clipped.statistics["dropped"]) == 1
    assert clipped.statistics["norms"].shape == (1, 3)
    assert losses.isnan().tolist() == [False, True, False]


def test_wrong_weights_of_a_policy_of_ones_own_stop_the_run_before_the_step(graphs):
    class Growing(ClippingPolicy):
        sensitivity = 1.0

        def groups(self, names):
            return [0] * len(names)

        def weights(self, squared_norms):
            return torch.where(squared_norms > 100.0, 1.0, 1.0 / (squared_norms.sqrt() + 1.0))

    step = step_of(nn.Linear(2, 1), policy=Growing(), size=2)
    step((torch.ones(3, 2),))
    with pytest.raises(ConfigurationError, match="further than its sensitivity"):
        step((100.0 * torch.ones(3, 2),))
    assert step.ledger.steps == 1
    step((torch.ones(3, 2),))


def test_a_policy_that_is_changed_in_place_never_meets_a_graph_of_its_former_sensitivity(graphs):
    class Movable(ClippingPolicy):
        bound = 1.0

        @property
        def sensitivity(self):
            return self.bound

        def groups(self, names):
            return [0] * len(names)

        def weights(self, squared_norms):
            return self.bound / (squared_norms.sqrt() + 1e-3)

    net, policy = nn.Linear(2, 1), Movable()
    step = step_of(net, policy=policy, size=2)
    step((torch.ones(1, 2),))
    policy.bound = 0.01
    _, clipped = step._summed((torch.ones(1, 2),), 1)
    assert clipped.sensitivity == 0.01
    assert size(dict(clipped.take())) == pytest.approx(0.01, rel=1e-3)
    assert len(graphs) == 2


def test_a_repeated_token_is_one_entry_in_a_graph(graphs):
    net = nn.Embedding(6, 3).double()
    for ids in (torch.tensor([[1, 1, 1, 1], [0, 2, 2, 5]]), torch.tensor([[0, 1, 2, 3], [4, 4, 4, 0]])):
        (found,) = sums_of(net, (ids,), loss=_squares)
        assert_exact(found, reference(net, (ids,), _squares, Flat(0.1)))


def _squares(module: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return F.layer_norm(module(batch[0]), (3,)).flatten(1).cumsum(1).square().sum(1)


def test_scratch_memory_is_never_part_of_a_graph():
    like = torch.empty(1)
    gc.collect()  # what other tests left in cycles must not come back in between
    free_idle()
    kept = scratch((2**17,), like)
    address = kept.data_ptr()
    del kept
    again = scratch((2**17,), like)
    assert again.data_ptr() == address
    del again
    with traced():
        assert tracing()
        assert scratch((2**17,), like).data_ptr() != address
    assert not tracing()
