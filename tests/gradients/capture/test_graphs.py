"""Batches of graphs: each example is one graph, and its nodes and edges are rows with owners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from privet import (
    ConfigurationError,
    CoverageError,
    Flat,
    Gaussian,
    Mechanism,
    Performance,
    Poisson,
    PrivacyEngine,
    PrivateStep,
    UnsupportedModelError,
)
from privet.gradients.reference import example_gradients
from tests.contracts.doors import DOORS, Expected, assert_exact, distance, door_sum, expected_sum, explicit_sum
from tests.gradients.graphs import GraphNet, Graphs, graphs, loss_of

pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")

SIZES = [(4, 7), (2, 3), (5, 0), (1, 1), (6, 9)]
COINCIDENCES = {
    "a node and an edge each": [(1, 1)] * 5,
    "as many nodes as edges": [(2, 1), (1, 2), (1, 0), (3, 4), (1, 1)],
    "as many edges as graphs": [(2, 1), (1, 0), (3, 2), (1, 1), (2, 1)],
    "one graph": [(4, 4)],
    "no edges": [(2, 0), (3, 0)],
}


def collated(some: list[Any]) -> Graphs:
    return Graphs.from_data_list(some)


def reference(net: nn.Module, some: list[Any], policy: Flat) -> Expected:
    gradients = example_gradients(net, [collated([one]) for one in some], lambda m, b: loss_of(m, b).sum())
    return expected_sum(gradients, policy)


def net_of(**options: Any) -> GraphNet:
    torch.manual_seed(0)
    return GraphNet(**options).double()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("loops", [True, False])
def test_the_sum_is_that_of_the_graphs_one_by_one(door: str, loops: bool) -> None:
    net, some, policy = net_of(loops=loops), graphs(SIZES), Flat(1e-2)
    found = door_sum(door, net, collated(some), loss=loss_of, policy=policy)
    assert_exact(found, reference(net, some, policy))


@pytest.mark.parametrize("sizes", COINCIDENCES.values(), ids=COINCIDENCES)
def test_sizes_that_coincide_change_nothing(sizes: list[tuple[int, int]]) -> None:
    net, some, policy = net_of(), graphs(sizes, seed=20), Flat(1e-2)
    for batches in ([collated(some)], [collated(graphs(SIZES)), collated(some)]):
        found = door_sum("explicit", net, *batches, loss=loss_of, policy=policy)
        assert_exact(found, reference(net, some, policy))


def test_one_graph_moves_the_sum_by_at_most_the_clip_norm() -> None:
    net, some = net_of(), graphs(SIZES)
    changed = copy.copy(some[-1])
    changed.x, changed.edge_attr = 1e3 * changed.x, -1e3 * changed.edge_attr

    def summed(part: list[Any]) -> dict[str, torch.Tensor]:
        return door_sum("explicit", net, collated(part), loss=lambda m, b: 1e3 * loss_of(m, b), policy=Flat(1.0))

    without = summed(some[:-1])
    assert 0.5 < distance(summed(some), without) <= 1.0 + 1e-6
    assert distance(summed([*some[:-1], changed]), without) <= 1.0 + 1e-6


@pytest.mark.parametrize("options", [{"passes": 2}, {"physical_batch_size": 2}], ids=["two passes", "physical"])
def test_ways_to_the_sum_agree(options: dict[str, Any]) -> None:
    net, some, policy = net_of(), graphs(SIZES), Flat(1e-2)
    found = explicit_sum(net, collated(some), loss=loss_of, policy=policy, **options)
    assert_exact(found, reference(net, some, policy))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("wrong", ["edges", "pool", "order"])
def test_graphs_that_meet_are_found(door: str, wrong: str) -> None:
    with pytest.raises((CoverageError, UnsupportedModelError)):
        door_sum(door, net_of(wrong=wrong), collated(graphs(SIZES)), loss=loss_of)


@pytest.mark.parametrize("door", DOORS)
def test_an_edge_between_two_graphs_is_refused_in_any_batch(door: str) -> None:
    joined = collated(graphs(SIZES))
    joined.edge_index = joined.edge_index.clone()
    joined.edge_index[1, 0] = len(joined.x) - 1
    with pytest.raises(ConfigurationError, match="joins nodes of two graphs"):
        door_sum(door, net_of(), collated(graphs(SIZES)), joined, loss=loss_of)


def test_a_vector_that_is_not_how_nodes_were_collated_is_refused() -> None:
    class Kept(Graphs):
        def to_data_list(self) -> list[Any]:
            return graphs(SIZES)

    wrong = Kept.from_data_list(graphs(SIZES))
    wrong.batch, wrong.edge_index = wrong.batch.clone(), wrong.edge_index[:, :0]
    wrong.edge_attr = wrong.edge_attr[:0]
    wrong.batch[3] = 1
    with pytest.raises((ConfigurationError, CoverageError, UnsupportedModelError)):
        door_sum("explicit", net_of(loops=False), wrong, loss=loss_of)


def test_compiled_graphs_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cannot be an input of a graph"):
        explicit_sum(net_of(), collated(graphs(SIZES)), loss=loss_of, policy=Flat(1.0), compile=True)


def test_the_paper_door_trains_on_its_own_batches_the_empty_one_too() -> None:
    net, data = net_of(), graphs([(3, 4), (2, 1), (1, 0), (4, 5)] * 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    _, _, loader = engine.make_private(
        module=net,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=1, collate_fn=collated),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(0),
    )
    sizes = []
    for batch in loader:
        optimizer.zero_grad()
        loss_of(net, batch).mean().backward()
        optimizer.step()
        sizes.append(batch.num_graphs)
    assert 0 in sizes
    assert max(sizes) > 1
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_the_explicit_door_trains_on_its_own_batches_the_empty_one_too() -> None:
    net, data = net_of(), graphs([(3, 4), (2, 1), (1, 0), (4, 5)] * 3)
    step = PrivateStep(
        net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        mechanism=Mechanism(sampling=Poisson(0.1), clipping=Flat(1.0), noise=Gaussian(1.0), steps=12),
        loss_per_example=loss_of,
        performance=Performance(physical_batch_size=2),
        noise_generator=torch.Generator().manual_seed(0),
    )
    sizes = []
    for batch in step.batches(data, collate_fn=collated):
        sizes.append(batch.num_graphs)
        assert step(batch).shape == (sizes[-1],)
    assert 0 in sizes
    assert max(sizes) > 2
