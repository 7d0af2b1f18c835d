"""What lies between a model's outputs and the loss, read from autograd while the backward runs.

A scalar loss hides how it was put together. Its graph does not: autograd knows each operation, the shapes that it met
and its options (values are let go of as the backward passes). The graph begins at the tensors that `backward` was
called with. They are found on the stack of the thread that waits for the backward: autograd tells them to nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

__all__ = ["LossGraph", "Operation", "graph_of", "read_graph"]

_MOST = 20_000  # operations that are looked at; a larger graph is not read


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a loss."""

    node: Any
    name: str
    """Of its backward, without the number of the overload: `Mean` for `MeanBackward1`."""
    shape: tuple[int, ...]
    """Of its (first) result."""
    inputs: tuple[Operation | None, ...]
    """What it was computed from; None for what the outputs have no part in."""

    def option(self, name: str, default: Any = None) -> Any:
        """Returns an option that the operation was called with, such as `dim`; `default` if it has none of that name.

        A tensor that was let go of is `...`.
        """
        try:
            return getattr(self.node, f"_saved_{name}", default)
        except RuntimeError:  # a tensor that was given, and is let go of
            return ...

    @property
    def fed(self) -> list[Operation]:
        """Returns the operations that it was computed from, as far as the outputs have a part in them."""
        return [each for each in self.inputs if each is not None]


@dataclass(frozen=True)
class LossGraph:
    """The operations between the outputs and the loss, each after those that it was computed from."""

    operations: list[Operation] = field(default_factory=list)
    ends: dict[Any, Operation] = field(default_factory=dict)
    """The operations, by their nodes, at which the reading stopped: the model's outputs, and trusted losses."""
    roots: list[Operation] = field(default_factory=list)


def read_graph(stops: Sequence[Any]) -> LossGraph | None:
    """Returns the graph of the backward that runs now, down to `stops`; None if it cannot be read.

    Args:
        stops: the nodes at which it ends.
    """
    known = set(stops)
    for roots in _roots_now():
        graph = _walked(roots, known)
        if graph is not None and graph.ends:
            return graph
    return None


def graph_of(loss: Tensor, inputs: Sequence[Tensor]) -> LossGraph | None:
    """Returns the graph of a loss that was not differentiated yet, down to its differentiable inputs; None if none."""
    if loss.grad_fn is None:
        return None
    return _walked([loss.grad_fn], {get_gradient_edge(t).node for t in inputs if t.requires_grad})


def _roots_now() -> list[list[Any]]:
    """Returns the nodes at which each backward began that runs in any thread, the innermost of a thread first."""
    found = []
    at: FrameType | None = None
    frames = sys._current_frames()  # noqa: SLF001 - a backward may run its hooks in a thread of its own
    for thread in frames:
        at = frames[thread]
        while at is not None:
            if at.f_code.co_name == "_engine_run_backward":
                found.append([_node(each) for each in at.f_locals.get("t_outputs", ())])
            at = at.f_back
    frames.clear()  # one of them is of this very call: such a ring would keep the graph alive
    return found


def _node(root: Any) -> Any:
    return root.grad_fn if isinstance(root, Tensor) else getattr(root, "node", None)


def _walked(roots: Sequence[Any], stops: set[Any]) -> LossGraph | None:
    """Returns the operations between roots and stops; None if there are too many."""
    children: dict[Node, tuple[Any, ...]] = {}
    order: list[Any] = []
    stack = [(node, False) for node in roots if node is not None]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in children:
            if len(children) >= _MOST:
                return None
            children[node] = () if node in stops else tuple(edge[0] for edge in node.next_functions)
            stack.append((node, True))
            stack += [(child, False) for child in children[node] if child is not None and child not in children]
    graph = LossGraph()
    found: dict[Any, Operation | None] = {}
    for node in order:
        inputs = tuple(None if child is None else found.get(child) for child in children[node])
        if node in stops or any(each is not None for each in inputs):
            found[node] = made = Operation(node, _name(node), _shape(node), inputs)
            if node in stops:
                graph.ends[node] = made
            else:
                graph.operations.append(made)
    graph.roots.extend(each for each in (found.get(node) for node in roots) if each is not None)
    return graph


def _name(node: Any) -> str:
    return str(node.name()).rstrip("0123456789").removesuffix("Backward")


def _shape(node: Any) -> tuple[int, ...]:
    metadata = getattr(node, "_input_metadata", ())
    return tuple(int(size) for size in metadata[0].shape) if metadata else ()
