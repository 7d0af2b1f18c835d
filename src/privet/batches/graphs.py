"""A batch of graphs as one leaf: each example is one graph, and all of them lie in one graph of many parts.

That is how PyTorch Geometric collates: the nodes of all graphs one after the other, a vector `batch` that says whose
each node is, and edges that are numbered anew. Cutting and joining is done by the class itself, which knows how it was
collated. Any class will do that offers what `GraphBatch` lists; the library is not imported.

Axes: B graphs, N nodes, E edges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from privet.errors import ConfigurationError

__all__ = [
    "GraphBatch",
    "RowsTold",
    "cut_graphs",
    "emptied_graphs",
    "graph_tensors",
    "hollow_graphs",
    "is_graphs",
    "join_graphs",
    "rows_of_graphs",
    "select_graphs",
    "with_tensors",
    "zero_graph",
]

_ZEROS = "_privet_graph_of_zeros"
"""Where an empty batch keeps what one graph of zeros looks like."""


class GraphBatch(Protocol):
    """What is asked of a batch of graphs, as `torch_geometric.data.Batch` answers it."""

    batch: Tensor  # (N,): the graph of each node
    edge_index: Tensor  # (2, E): the nodes that each edge joins

    @property
    def num_graphs(self) -> int:
        """Returns B."""

    def to_dict(self) -> Mapping[str, Any]:
        """Returns all attributes by name."""

    def to_data_list(self) -> list[Any]:
        """Returns the graphs, each as it was before it was collated."""

    @classmethod
    def from_data_list(cls, data_list: list[Any]) -> GraphBatch:
        """Returns the batch of some graphs."""


class RowsTold(NamedTuple):
    """What is told of one tensor of a batch."""

    tensor: Tensor  # (R, ...)
    owner: Tensor | None  # (R,): the example of each of its rows
    numbers_of: Tensor | None = None  # the examples of the rows that its entries are numbers of


def is_graphs(value: object) -> TypeGuard[GraphBatch]:
    """Returns whether a value is a batch of graphs."""
    cls = type(value)
    if not (hasattr(cls, "to_data_list") and hasattr(cls, "from_data_list") and hasattr(cls, "to_dict")):
        return False
    return isinstance(getattr(value, "batch", None), Tensor)


def graph_tensors(graphs: GraphBatch) -> list[Tensor]:
    """Returns the tensors of a batch of graphs, in order."""
    return [t for t in graphs.to_dict().values() if isinstance(t, Tensor)]


def with_tensors(graphs: GraphBatch, change: Callable[[Tensor], Tensor]) -> GraphBatch:
    """Returns the batch with `change(t)` in place of each of its tensors."""
    other = copy.copy(graphs)
    for name, value in graphs.to_dict().items():
        if isinstance(value, Tensor):
            setattr(other, name, change(value))
    return other


def hollow_graphs(graphs: GraphBatch) -> GraphBatch:
    """Returns graphs of as many nodes and edges with nothing but zeros in them: every edge joins node 0 to itself."""
    hollow = copy.copy(graphs)
    for name, value in graphs.to_dict().items():
        if isinstance(value, Tensor) and not name.endswith(("batch", "ptr")):
            setattr(hollow, name, torch.zeros_like(value, requires_grad=False))
    return hollow


def cut_graphs(graphs: GraphBatch, start: int, stop: int) -> GraphBatch:
    """Returns graphs `start` to `stop`."""
    if stop > start:
        return graphs if (start, stop) == (0, graphs.num_graphs) else _collated(graphs, _graphs(graphs)[start:stop])
    if not graphs.num_graphs:
        return graphs
    one = hollow_graphs(_collated(graphs, _graphs(graphs)[:1]))
    return emptied_graphs(one, join_graphs(one, one))


def join_graphs(first: GraphBatch, second: GraphBatch) -> GraphBatch:
    """Returns the graphs of both."""
    return _collated(first, [*_graphs(first), *_graphs(second)])


def select_graphs(graphs: GraphBatch, sources: Sequence[int], factors: Sequence[float] | None = None) -> GraphBatch:
    """Returns graph `sources[i]` in place i, its floating-point tensors multiplied by `factors[i]`."""
    alone = _graphs(graphs)
    chosen = [copy.copy(alone[source]) for source in sources]
    for one, factor in zip(chosen, factors or (), strict=False):
        for name, value in one.to_dict().items():
            if factor != 1.0 and isinstance(value, Tensor) and value.is_floating_point():
                setattr(one, name, value * factor)
    return _collated(graphs, chosen)


def emptied_graphs(one: GraphBatch, two: GraphBatch) -> GraphBatch:
    """Returns the batch of no graphs, given one of one graph of zeros, and one of the same graph twice.

    Raises:
        ConfigurationError: if the class still counts graphs in it.
    """
    empty = copy.copy(one)
    second = two.to_dict()
    for name, value in one.to_dict().items():
        other = second[name]
        if isinstance(value, Tensor):
            axes = [axis for axis, (n, m) in enumerate(zip(value.shape, other.shape, strict=True)) if n != m]
            for axis in axes:  # where one more graph brings one entry more, there is one for no graph: `ptr`
                value = value.narrow(axis, 0, 2 * value.shape[axis] - other.shape[axis])  # noqa: PLW2901
            setattr(empty, name, value.clone())
        elif isinstance(value, list) and len(other) == 2 * len(value):
            setattr(empty, name, [])
    vars(empty)[_ZEROS] = one
    if empty.num_graphs:
        vars(empty)["_num_graphs"] = 0  # where PyTorch Geometric keeps it
    if empty.num_graphs:
        raise ConfigurationError(
            f"a batch of no {type(one).__name__} still says that it holds {empty.num_graphs} graphs. Expected "
            "num_graphs to follow from the tensors, or from an attribute `_num_graphs`."
        )
    return empty


def zero_graph(empty: GraphBatch) -> GraphBatch:
    """Returns one graph of zeros, as an empty batch that was made here keeps it, on the device of that batch.

    Raises:
        ConfigurationError: if the empty batch was made elsewhere.
    """
    one: GraphBatch | None = vars(empty).get(_ZEROS)
    if one is None:
        raise ConfigurationError(
            f"a {type(empty).__name__} holds no graphs, and nobody knows what one looks like. Expected the empty "
            "batches of the private loader. Leave batches without graphs out, or use the loader."
        )
    device = empty.batch.device
    return with_tensors(one, lambda t: t.to(device))


def rows_of_graphs(graphs: GraphBatch) -> list[RowsTold]:
    """Returns what a batch of graphs says of its tensors: whose rows they have, and which rows they are numbers of.

    Raises:
        ConfigurationError: if an edge joins two graphs, or `batch` is not how the nodes were collated.
    """
    examples, nodes = graphs.num_graphs, graphs.batch
    edges = getattr(graphs, "edge_index", None)
    if isinstance(edges, Tensor) and not torch.equal(nodes[edges[0]], nodes[edges[1]]):
        raise ConfigurationError(
            "an edge joins nodes of two graphs of the batch, whose examples then meet. Expected edges inside of one "
            "graph, and a vector `batch` that says which graph each node belongs to. Collate the graphs anew."
        )
    owners: dict[tuple[int, ...], Tensor] = {}

    def owner_of(counts: Tensor) -> Tensor:
        """Returns whose each row is where graphs have so many, as one object for equal counts."""
        key = tuple(counts.tolist())
        if key not in owners:
            each = torch.arange(examples, device=nodes.device)
            owners[key] = each.repeat_interleave(counts.to(nodes.device))
        return owners[key]

    ends = getattr(graphs, "ptr", None)
    collated = [owner_of(ends.diff())] if isinstance(ends, Tensor) and ends.dim() == 1 else []
    found = [
        (t, owner_of(slices.diff()))
        for name, slices in _slices(graphs).items()
        if isinstance(t := getattr(graphs, name, None), Tensor) and t.dim() and t.shape[0] == int(slices[-1])
    ]
    candidates = collated or list(owners.values())
    if not any(owner.shape == nodes.shape and torch.equal(owner, nodes) for owner in candidates):
        raise ConfigurationError(
            "the vector `batch` of a batch of graphs is not how its nodes were collated. Expected node i to belong to "
            "graph batch[i], as collated. Collate the graphs anew, and change single graphs before they are."
        )
    by_nodes = next(owner for owner in candidates if owner.shape == nodes.shape and torch.equal(owner, nodes))
    told = [RowsTold(t, owner) for t, owner in found]
    told.append(RowsTold(nodes, by_nodes, numbers_of=owner_of(torch.ones(examples, dtype=torch.int64))))
    if isinstance(edges, Tensor):
        told.append(RowsTold(edges, None, numbers_of=by_nodes))
    return told


# -- pieces ------------------------------------------------------------------------------------------------------------


def _graphs(graphs: GraphBatch) -> list[Any]:
    found = graphs.to_data_list()
    if len(found) != graphs.num_graphs:
        raise ConfigurationError(
            f"a {type(graphs).__name__} of {graphs.num_graphs} graphs came apart into {len(found)}. Expected "
            "to_data_list() to return each graph."
        )
    return found


def _collated(like: GraphBatch, graphs: list[Any]) -> GraphBatch:
    # The class of a batch of PyTorch Geometric is made for the graphs in it: the one that collates is its base.
    cls: Any = next(c for c in type(like).__mro__ if "from_data_list" in vars(c))
    names = like.to_dict()
    followed = [name for name in graphs[0].to_dict() if f"{name}_batch" in names and f"{name}_ptr" in names]
    made: GraphBatch = cls.from_data_list(graphs, follow_batch=followed) if followed else cls.from_data_list(graphs)
    return made


def _slices(graphs: GraphBatch) -> Mapping[str, Tensor]:
    """Returns for each tensor with the graphs along axis 0 where each graph begins and ends in it, (B + 1,)."""
    axis_of = getattr(graphs, "__cat_dim__", None)
    kept = getattr(graphs, "_slice_dict", None)
    if axis_of is not None and isinstance(kept, Mapping):
        return {
            name: slices.cpu()
            for name, slices in kept.items()
            if isinstance(slices, Tensor) and axis_of(name, getattr(graphs, name, None)) in {0, None}
        }
    alone = [one.to_dict() for one in _graphs(graphs)]
    found = {}
    for name, whole in graphs.to_dict().items():
        rows = [one[name] for one in alone if isinstance(one.get(name), Tensor)]
        if not isinstance(whole, Tensor) or len(rows) != len(alone) or not rows:
            continue
        if all(row.dim() == whole.dim() > 0 and row.shape[1:] == whole.shape[1:] for row in rows):
            counts = torch.tensor([row.shape[0] for row in rows])
            found[name] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return found
