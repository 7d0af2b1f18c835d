"""Layers of PyTorch Geometric, on a graph of the same size for each example, whose nodes lie one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import CLASSES, Batch, Case, Size, by_class, labels

NODES = 6


class Network(nn.Module):
    """Two layers and a mean over each graph's nodes. All examples have one ring of edges."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        def layer(ins: int, outs: int) -> nn.Module:
            if kind == "GINConv":
                return layers.GINConv(nn.Sequential(nn.Linear(ins, outs), nn.ReLU(), nn.Linear(outs, outs)), **settings)
            made: nn.Module = getattr(layers, kind)(ins, outs, **settings)
            return made

        self.first, self.second, self.head = layer(5, 8), layer(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B, nodes, 5)
        n = x.shape[0]
        ring = torch.arange(NODES)
        edges = torch.stack([torch.cat([ring, (ring + 1) % NODES]), torch.cat([(ring + 1) % NODES, ring])])
        whole = torch.cat([edges + NODES * i for i in range(n)], 1)
        h = torch.relu(self.second(torch.relu(self.first(x.flatten(0, 1), whole)), whole))
        found: Tensor = self.head(h.view(n, NODES, -1).mean(1))
        return found


class Dense(nn.Module):
    """Dense graph convolutions, by torch_geometric's layers for adjacency matrices."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        self.first, self.head = getattr(layers, kind)(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.first(x, adjacency)).mean(1))
        return found


def _flat(n: int, s: Size) -> Batch:
    return torch.randn(n, NODES, 5), labels(n)


def _matrices(n: int, s: Size) -> Batch:
    return torch.randn(n, NODES, 5), (torch.rand(n, NODES, NODES) < 0.5).double(), labels(n)


def cases() -> list[Case]:
    """Returns the cases of this family."""
    rows = "privet.rows_of(batch) around the linear maps, at the explicit door"
    dense = lambda m, b: nn.functional.cross_entropy(m(*b[:2]), b[2], reduction="none")  # noqa: E731
    return [
        *(
            Case(kind, lambda s, kind=kind: Network(kind), _flat, by_class, note=rows)
            for kind in ("GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "GINConv", "GraphConv", "TransformerConv")
        ),
        *(
            Case(kind, lambda s, kind=kind: Dense(kind), _matrices, dense)
            for kind in ("DenseGCNConv", "DenseSAGEConv", "DenseGraphConv")
        ),
    ]
