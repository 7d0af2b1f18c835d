"""Layers and batches of PyTorch Geometric, as they come."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privet import Flat, PrivacyEngine
from privet.gradients.reference import example_gradients
from tests.contracts.doors import DOORS, assert_exact, distance, door_sum, expected_sum
from tests.gradients.graphs import graph

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its import uses what torch means to give up
    pytest.importorskip("torch_geometric")
    data = pytest.importorskip("torch_geometric.data")
    layers = pytest.importorskip("torch_geometric.nn")
pytestmark = pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come:UserWarning")

D = 4
SIZES = [(4, 7), (2, 3), (5, 0), (1, 1)]
COINCIDE = [(2, 1), (1, 2), (1, 0), (3, 4), (1, 1)]  # as many edges as nodes


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))


LAYERS = {
    "GCN": (lambda: layers.GCNConv(D, D), False),
    "GAT": (lambda: layers.GATConv(D, D // 2, heads=2, edge_dim=2), True),
    "GATv2": (lambda: layers.GATv2Conv(D, D // 2, heads=2), False),
    "GATv2 with edges": (lambda: layers.GATv2Conv(D, D // 2, heads=2, edge_dim=2), True),
    "SAGE": (lambda: layers.SAGEConv(D, D, root_weight=False), False),
    "GIN": (lambda: layers.GINConv(mlp()), False),
    "GINE": (lambda: layers.GINEConv(mlp(), edge_dim=2), True),
}
POOLS = ("global_mean_pool", "global_add_pool", "global_max_pool")


class Net(nn.Module):
    def __init__(self, kind: str, pool: str) -> None:
        super().__init__()
        make, self.edges = LAYERS[kind]
        self.first, self.second, self.last = make(), make(), nn.Linear(D, 2)
        self.pool = getattr(layers, pool)

    def forward(self, batch: Any) -> Tensor:
        more = (batch.edge_attr,) if self.edges else ()
        h = self.first(batch.x, batch.edge_index, *more).relu()
        h = self.second(h, batch.edge_index, *more)
        return self.last(self.pool(h, batch.batch))  # type: ignore[no-any-return]


def graphs(sizes: list[tuple[int, int]]) -> list[Any]:
    return [data.Data(**graph(*size, seed).to_dict()) for seed, size in enumerate(sizes)]


def collated(some: list[Any]) -> Any:
    return data.Batch.from_data_list(some)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch), batch.y, reduction="none")


def net_of(kind: str, pool: str = POOLS[0]) -> Net:
    torch.manual_seed(0)
    return Net(kind, pool).double()


@pytest.mark.parametrize(
    ("kind", "door", "pool"),
    [(kind, DOORS[i % 2], POOLS[i % 3]) for i, kind in enumerate(LAYERS)],
)
def test_the_sum_is_that_of_the_graphs_one_by_one(kind: str, door: str, pool: str) -> None:
    net, some, policy = net_of(kind, pool), graphs(COINCIDE), Flat(1e-2)
    found = door_sum(door, net, collated(graphs(SIZES)), collated(some), loss=loss_of, policy=policy)
    one_by_one = example_gradients(net, [collated([one]) for one in some], lambda m, b: loss_of(m, b).sum())
    assert_exact(found, expected_sum(one_by_one, policy))


def test_one_graph_moves_the_sum_by_at_most_the_clip_norm() -> None:
    net, some = net_of("GATv2"), graphs(SIZES)
    changed = some[-1].clone()
    changed.x = 1e3 * changed.x

    def summed(part: list[Any]) -> dict[str, Tensor]:
        return door_sum("explicit", net, collated(part), loss=lambda m, b: 1e3 * loss_of(m, b), policy=Flat(1.0))

    without = summed(some[:-1])
    assert distance(summed(some), without) <= 1.0 + 1e-6
    assert distance(summed([*some[:-1], changed]), without) <= 1.0 + 1e-6


def test_its_own_loader_is_made_private() -> None:
    loaders = pytest.importorskip("torch_geometric.loader")
    net = net_of("GCN")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    _, _, loader = PrivacyEngine(accountant="rdp").make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loaders.DataLoader(graphs(SIZES * 4), batch_size=1),
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
