"""A graph is used for what it was traced for and for nothing else: anything that it depends on brings another graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privet import Flat, Gaussian, Mechanism, Poisson, UnsupportedModelError
from privet.clipping import Automatic
from tests.contracts.doors import Expected, assert_exact, distance, size, taken
from tests.gradients.passes.compiled.graphs import step_of


class Scaled(nn.Module):
    """Has everything that Python may change between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(3))
        self.bend = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x) * self.scale + self.shift
        return self.head(torch.tanh(h * self.bend) if self.training else h)


def loss(module: nn.Module, batch: Any) -> Tensor:
    return module(batch["x"]).square().sum(1) * batch["power"]


def batch_of(n: int = 5, *, power: Any = 1.0) -> dict[str, Any]:
    return {"x": torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), "power": power}


@pytest.fixture
def pair(graphs):
    """Two runs from the same start, one compiled: a function that steps both, compares, and counts the graphs."""
    torch.manual_seed(0)
    nets = [Scaled()]
    nets.append(copy.deepcopy(nets[0]))
    steps = [
        step_of(net, loss=loss, graph=graph, size=3, rate=0.1) for net, graph in zip(nets, (True, False), strict=True)
    ]
    seen = [taken(net, step.optimizer) for net, step in zip(nets, steps, strict=True)]

    def check(batch: dict[str, Any] | None = None, *, change: Any = lambda net: None) -> int:
        for net, step in zip(nets, steps, strict=True):
            change(net)
            step(batch_of() if batch is None else batch)
        most = 0.1 * len((batch_of() if batch is None else batch)["x"])  # the terms: at most the clip norm each
        assert_exact(seen[0][-1], Expected(seen[1][-1], terms=most), tolerance=1e-5)
        return len(graphs)

    check.nets, check.steps = nets, steps
    return check


def test_one_graph_follows_the_optimizer(pair):
    for n in (5, 3, 1, 7, 0, 2):
        assert pair(batch_of(n)) == 1
    for name, p in pair.nets[0].named_parameters():
        assert torch.allclose(p, dict(pair.nets[1].named_parameters())[name], rtol=1e-4, atol=1e-6)


def test_what_is_an_input_needs_no_other_graph(pair):
    pair()

    def weights(net: nn.Module) -> None:
        torch.manual_seed(8)
        net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()})

    def inside(net: nn.Module) -> None:
        net.bend.mul_(0.5)

    def moved(net: nn.Module) -> None:
        net.shift = net.shift + 1.0

    for change in (weights, inside, moved):
        assert pair(change=change) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "scale", 0.5),
        lambda net: net.eval(),
        lambda net: net.layer.requires_grad_(False),
        lambda net: setattr(net, "bend", torch.full((3,), 0.5)),
    ],
    ids=["a number", "eval mode", "a frozen layer", "another tensor"],
)
def test_a_change_of_the_model_brings_one_graph_more(pair, change):
    assert pair() == 1
    assert pair(change=change) == 2
    assert pair() == 2


@pytest.mark.parametrize(
    "batch",
    [batch_of(power=2.0), batch_of(power=1), batch_of(power=torch.ones(5)), {**batch_of(), "name": None}],
    ids=["another number", "an integer", "a tensor", "one key more"],
)
def test_a_batch_of_another_form_brings_one_graph_more(pair, batch):
    assert pair() == 1
    assert pair(batch) == 2
    assert pair() == 2
    assert pair(batch) == 2


def test_another_policy_brings_one_graph_more(pair):
    pair()
    rows = ((Flat(0.2), 2), (Flat(0.1), 2), (Flat(0.2), 2), (Automatic(0.2), 3), (Automatic(0.2, stability=1.0), 4))
    for policy, expected in rows:
        for step in pair.steps:
            step._update.mechanism = Mechanism(sampling=Poisson(0.1), clipping=policy, noise=Gaussian(0.0))
        assert pair() == expected


def test_autocast_brings_one_graph_more(pair):
    pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pair() == 2
    assert pair() == 2


def test_many_graphs_bring_a_warning_and_the_oldest_are_let_go_of(pair):
    for turn in range(8):
        pair(batch_of(power=float(turn)))
    with pytest.warns(UserWarning, match="traced and compiled 9 graphs"):
        pair(batch_of(power=8.0))
    assert len(pair.steps[0]._way.engine._graphs) == 8
    assert pair(batch_of(power=1.0)) == 9
    assert pair(batch_of(power=0.0)) == 10


# -- randomness --------------------------------------------------------------------------------------------------------


def test_dropout_is_fresh_in_every_call_and_eager_under_the_same_seed(graphs):
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    twin = copy.deepcopy(net)
    batch, found = (torch.ones(4, 4),), []
    one = step_of(net, loss=lambda m, b: m(b[0]).sum(1), size=4)
    two = step_of(twin, loss=lambda m, b: m(b[0]).sum(1), size=4, graph=False)
    one(batch), two(batch)
    for seed in (1, 2):
        sums = []
        for step in (one, two):
            torch.manual_seed(seed)
            sums.append(dict(step._summed(batch, 4)[1].take()))
        assert_exact(sums[0], Expected(sums[1], terms=4 * 0.1))  # four examples, clipped to 0.1
        found.append(sums[0])
    assert distance(*found) > 0.01 * size(found[0])
    again = dict(one._summed(batch, 4)[1].take())
    assert distance(again, found[1]) > 0.01 * size(again)
    assert len(graphs) == 1


def test_tracing_and_its_trial_leave_random_numbers_and_weights_alone(graphs):
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    step = step_of(net, loss=lambda m, b: m(b[0]).sum(1), size=4, graph=False)
    step((torch.ones(4, 4),))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    expected = dict(step._summed((torch.ones(4, 4),), 4)[1].take())
    for p in net.parameters():
        p.requires_grad_(False).requires_grad_(True)
    twin = copy.deepcopy(net)
    other = step_of(twin, loss=lambda m, b: m(b[0]).sum(1), size=4)
    other._first.run((torch.ones(4, 4),), 4)  # so that what follows traces alone
    torch.manual_seed(3)
    found = dict(other._summed((torch.ones(4, 4),), 4)[1].take())
    assert_exact(found, Expected(expected, terms=4 * 0.1))
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())


# -- refusals ----------------------------------------------------------------------------------------------------------


def broken(forward: Any) -> nn.Module:
    """Returns a model with a forward of one's own, which gets (module, x)."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.calls = 0
            self.last: Tensor = torch.zeros(3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    return Broken()


def _branching(m: Any, x: Tensor) -> Tensor:
    return m.layer(x) * (2.0 if float(x.sum()) > -1e30 else 1.0)  # a number that Python asks for, always alike


def _counting(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.layer(x)


def _writing(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.layer(x)


def _random(m: Any, x: Tensor) -> Tensor:
    import random

    return m.layer(x) * (1.0 + random.random())


def _numpy_random(m: Any, x: Tensor) -> Tensor:
    import numpy as np

    return m.layer(x) * (1.0 + float(np.random.rand()))  # noqa: NPY002 - as users may


def _by_data(m: Any, x: Tensor) -> Tensor:
    return m.layer(x) * (m.layer(x).data.square().sum(1, keepdim=True) + 1.0)


def _by_weight(m: Any, x: Tensor) -> Tensor:
    return m.layer(x) / m.layer.weight.data.norm()


def _by_numpy(m: Any, x: Tensor) -> Tensor:
    return m.layer(x) * torch.from_numpy(x.detach().numpy()[:, :1] + 3.0)


def _carrying(m: Any, x: Tensor) -> Tensor:
    out = m.layer(x) * (1.0 + m.last)
    m.last = torch.full((3,), 0.5)
    return out


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (_branching, "cannot make one graph"),
        (_counting, "changes attributes"),
        (_writing, "writes to buffers"),
        (_random, "Python's random numbers"),
        (_numpy_random, "NumPy's random numbers"),
        (_by_numpy, "does not follow"),
        (_carrying, "an earlier forward left"),
    ],
)
def test_what_a_graph_would_do_wrong_is_refused_and_nothing_is_released(graphs, forward, match):
    torch.manual_seed(0)
    net = broken(forward)
    before = copy.deepcopy(net.state_dict())
    step = step_of(net, loss=lambda m, b: m(b[0]).square().sum(1), size=5, rate=1.0, noise=1.0)
    with pytest.raises(UnsupportedModelError, match=match):
        step((torch.randn(5, 4),))
    assert step.ledger.steps == 0
    assert not step._update.pending
    assert not step._capture.watching
    assert {type(p) for p in net.parameters()} == {nn.Parameter}
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(net.layer.weight, before["layer.weight"])


@pytest.mark.parametrize("forward", [_by_data, _by_weight])
def test_values_taken_past_autograd_are_followed_or_refused(graphs, forward):
    torch.manual_seed(0)
    net = broken(forward)
    twin = copy.deepcopy(net)
    steps = [
        step_of(m, loss=lambda m, b: m(b[0]).square().sum(1), graph=g, rate=0.5)
        for m, g in ((net, True), (twin, False))
    ]
    for n in (5, 4):
        batch = (torch.randn(n, 4),)
        steps[1](batch)
        try:
            steps[0](batch)
        except UnsupportedModelError:
            return
    assert torch.allclose(net.layer.weight, twin.layer.weight, rtol=1e-4, atol=1e-6)  # an entry may end near zero


def test_a_backend_that_fails_releases_nothing_and_says_so(monkeypatch):
    from privet.gradients.passes.compiled import step_graph

    def failing(graph: Any, **options: Any) -> Any:
        def run(inputs: list[Tensor]) -> list[Tensor]:
            raise RuntimeError("no compiler")

        return run

    monkeypatch.setattr(step_graph.torch, "compile", failing)
    net = nn.Linear(4, 1)
    step = step_of(net, loss=lambda m, b: m(b[0]).sum(1), noise=1.0)
    with pytest.raises(UnsupportedModelError, match="no compiler"):
        step((torch.randn(5, 4),))
    assert step.ledger.steps == 0


def test_nothing_of_a_step_is_left(graphs):
    net = nn.Linear(4, 1)
    step = step_of(net, loss=lambda m, b: m(b[0]).sum(1), noise=1.0)
    for _ in range(2):
        losses = step((torch.randn(5, 4),))
        assert not losses.requires_grad
        assert net.weight.grad is None
        assert type(net.weight) is nn.Parameter
