"""The networks of the benchmark: one whole graph each, for batches of any size, with the eager sums and noise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import NETWORKS, Network, Transformer, texts
from privet import Flat, Gaussian, Mechanism, Performance, Poisson, PrivateStep
from privet.gradients.passes.compiled import step_graph
from tests.contracts.doors import Expected, assert_exact, distance, size, taken

SMALL = {
    **NETWORKS,
    "transformer": Network(build=lambda: Transformer(width=64, length=16), batch=texts(16), parameters=0),
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def run(net: nn.Module, batches: list[Any], *, noise: float, **options: Any) -> list[dict[str, Tensor]]:
    """Returns the gradients of one step for each batch."""
    net = copy.deepcopy(net)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1e-3),
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=Gaussian(noise)),
        loss_per_example=loss,
        expected_batch_size=1,
        noise_generator=torch.Generator().manual_seed(3),
        performance=Performance(**options),
    )
    seen = taken(net, step.optimizer)
    for batch in batches:
        step(batch)
    return seen


@pytest.fixture
def compilations(monkeypatch):
    """Counts the graphs that reach the backend, and runs them as they are."""
    found = []

    def counting(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(step_graph, "_BACKEND", counting)
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.deep] if name in {"cifar", "resnet", "transformer"} else [])
        for name in SMALL
    ],
)
def test_a_network_is_one_graph_with_the_eager_sum(name, compilations):
    torch.manual_seed(1)
    network = SMALL[name]
    net, batches = network.build(), [network.batch(n) for n in (2, 3, 0)]
    eager = run(net, batches, noise=0.0)
    compiled = run(net, batches, noise=0.0, compile=True, physical_batch_size=2)
    assert len(compilations) == 1
    assert torch._dynamo.utils.counters["graph_break"] == {}
    for ours, theirs, n in zip(compiled, eager, (2, 3, 0), strict=True):
        assert_exact(ours, Expected(theirs, terms=n * 1.0))
    assert size(eager[0]) > size(eager[2]) == 0.0


def test_noise_is_bit_equal_compiled_or_not(compilations):
    class Zero(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.0

    net = Zero(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (5, 2, 0)]
    eager = run(net, batches, noise=1.3)
    compiled = run(net, batches, noise=1.3, compile=True, physical_batch_size=2)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert all(bool(ours[n].abs().min() > 0) for n in theirs)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it loads its compiler
def test_the_compiler_of_users_gives_the_eager_sum():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(n, 6), torch.randint(3, (n,))) for n in (4, 3, 5)]
    eager = run(net, batches, noise=0.0)
    compiled = run(net, batches, noise=0.0, compile=True, physical_batch_size=4)
    for ours, theirs, batch in zip(compiled, eager, batches, strict=True):
        assert_exact(ours, Expected(theirs, terms=len(batch[0]) * 1.0))


@pytest.mark.deep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it loads its compiler
def test_compiled_dropout_is_fresh_in_every_call():
    net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    batch = (torch.ones(4, 4), torch.zeros(4, dtype=torch.long))
    first, second, third = run(net, [batch] * 3, noise=0.0, compile=True, physical_batch_size=4)
    assert distance(first, second) > 0.01 * size(first)
    assert distance(second, third) > 0.01 * size(first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", ["mnist", "embedding"])
def test_a_network_on_an_accelerator_gives_the_eager_sum(name, compilations):
    torch.manual_seed(1)
    network = SMALL[name]
    net = network.build().cuda()
    batches = [tuple(t.cuda() for t in network.batch(n)) for n in (4, 3, 5)]
    eager = run(net, batches, noise=0.0)
    compiled = run(net, batches, noise=0.0, compile=True, physical_batch_size=4)
    for ours, theirs, batch in zip(compiled, eager, batches, strict=True):
        assert_exact(ours, Expected(theirs, terms=len(batch[0]) * 1.0), tolerance=1e-3)
