"""A batch of graphs and a graph network written by hand, so that no library of graphs is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 4


class Graph:
    """One graph: nodes with features, directed edges with features, and a class."""

    def __init__(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, y: Tensor) -> None:
        self.x, self.edge_index, self.edge_attr, self.y = x, edge_index, edge_attr, y

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Graphs(Graph):
    """Several graphs in one, as libraries of graphs collate them."""

    batch: Tensor

    @property
    def num_graphs(self) -> int:
        return len(self.y)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to_data_list(self) -> list[Graph]:
        found = []
        for place in range(self.num_graphs):
            nodes, edges = self.batch == place, self.batch[self.edge_index[0]] == place
            first = int(nodes.nonzero()[0]) if nodes.any() else 0
            found.append(
                Graph(
                    self.x[nodes], self.edge_index[:, edges] - first, self.edge_attr[edges], self.y[place : place + 1]
                )
            )
        return found

    @classmethod
    def from_data_list(cls, data_list: list[Graph]) -> Graphs:
        sizes = torch.tensor([len(graph.x) for graph in data_list])
        starts = (sizes.cumsum(0) - sizes).tolist()
        made = cls(
            torch.cat([graph.x for graph in data_list]),
            torch.cat([g.edge_index + start for g, start in zip(data_list, starts, strict=True)], dim=1),
            torch.cat([graph.edge_attr for graph in data_list]),
            torch.cat([graph.y for graph in data_list]),
        )
        made.batch = torch.arange(len(data_list)).repeat_interleave(sizes)
        return made


def graph(nodes: int, edges: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Graph:
    """Returns a graph of random features, edges and class."""
    g = torch.Generator().manual_seed(seed)
    return Graph(
        torch.randn(nodes, FEATURES, generator=g, dtype=dtype),
        torch.randint(max(nodes, 1), (2, edges), generator=g),
        torch.randn(edges, 2, generator=g, dtype=dtype),
        torch.randint(2, (1,), generator=g),
    )


def graphs(sizes: list[tuple[int, int]], seed: int = 0) -> list[Graph]:
    """Returns graphs of (nodes, edges) each."""
    return [graph(*size, seed + place) for place, size in enumerate(sizes)]


class Attention(nn.Module):
    """A layer with linear maps of nodes, edges and self-loops, a scale, weights that add up to one, and a bias."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(features, features, bias=False), nn.Linear(2, features)
        self.score, self.bias = nn.Parameter(torch.randn(1, features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        h, loops = self.nodes(x), torch.arange(len(x))
        source, target = edge_index
        mean = torch.zeros(len(x), 2, dtype=x.dtype).index_reduce(0, target, edge_attr, "mean", include_self=False)
        source, target = torch.cat([source, loops]), torch.cat([target, loops])
        between = self.edges(torch.cat([edge_attr, mean]))  # one row for each edge and each loop
        message = h[source] + between
        score = (F.leaky_relu(message + h[target]) * self.score).sum(-1)
        weight = score.sigmoid() + 1e-3
        total = torch.zeros(len(x), dtype=x.dtype).index_add(0, target, weight)
        weight = weight / total[target]
        return torch.zeros_like(h).index_add_(0, target, message * weight.unsqueeze(1)) + self.bias


class GraphNet(nn.Module):
    """Convolutions, attention, and a read-out; with `loops=False` nodes without edges get zeros and a bias."""

    def __init__(self, *, loops: bool = True, wrong: str = "") -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(FEATURES, FEATURES), Attention(FEATURES)
        self.last, self.bias = nn.Linear(FEATURES, 2), nn.Parameter(torch.zeros(FEATURES))
        self.loops, self.wrong = loops, wrong

    def forward(self, batch: Any) -> Tensor:
        source, target = batch.edge_index
        h = self.first(batch.x).relu()
        if self.wrong == "edges":
            source = source.roll(1)
        h = torch.zeros_like(h).scatter_add(0, target.unsqueeze(1).expand(-1, FEATURES), h[source]) + self.bias
        if self.loops:
            h = self.attention(h.tanh(), batch.edge_index, batch.edge_attr)
        owner = (batch.batch + 1) % batch.num_graphs if self.wrong == "pool" else batch.batch
        if self.wrong == "order":
            h = h.flip(0)
        return self.last(torch.zeros(batch.num_graphs, FEATURES, dtype=h.dtype).index_add(0, owner, h))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch), batch.y, reduction="none")
