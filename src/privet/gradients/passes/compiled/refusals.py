"""What cannot be a graph, found out while one is traced: an error with the reason, and not a graph that goes stale."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn
from torch.fx import GraphModule

from privet.batches.out_of_memory import is_out_of_memory
from privet.errors import PrivetError, UnsupportedModelError
from privet.gradients.passes.compiled.situation import Place, plain_attributes, tensor_attributes

__all__ = ["Written", "explained", "watched_forward"]


@contextmanager
def explained() -> Iterator[None]:
    """Says of whatever is raised that a graph was to be made, unless memory ran out."""
    try:
        yield
    except PrivetError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"compile=True cannot make one graph of model, loss and clipping: {type(error).__name__}: {error} Expected "
            "operations on tensors alone: no branch on their values, no item() or tolist(), no shape that depends on "
            "values; and a compiler that torch.compile can use. Use torch.where, or train with compile=False."
        ) from error


class Written:
    """The tensors that a forward left on modules: each is written before it is read, or the model is refused."""

    def __init__(self) -> None:
        self.places: set[Place] = set()
        self._before: list[Any] = []

    def add(self, before: dict[Place, Any], after: dict[Place, Any]) -> None:
        """Takes note of what changed."""
        changed = [place for place, value in after.items() if before.get(place) is not value]
        self.places.update(changed)
        self._before = [before[place] for place in changed if place in before]

    def refuse_read_first(self, graph: GraphModule) -> None:
        """Raises if the graph reads what an earlier forward left."""
        constants = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        before, self._before = self._before, []  # they may hold a whole forward
        if any(value is constant for value in before for constant in constants):
            raise _refused("reads a tensor that an earlier forward left on a module")


@contextmanager
def watched_forward(module: nn.Module, written: Written) -> Iterator[None]:
    """Raises if a forward changed what a graph would not change; puts back the tensors that it left on modules."""

    def outside() -> tuple[Any, ...]:
        buffers = {name: (id(b), b._version) for name, b in module.named_buffers()}  # noqa: SLF001 - as autograd asks
        state = np.random.get_state()  # noqa: NPY002 - users' own
        return buffers, plain_attributes(module), random.getstate(), (state[0], state[1].tobytes(), *state[2:])  # type: ignore[index]

    before, tensors = outside(), tensor_attributes(module)
    children = dict(module.named_modules())
    try:
        yield
        written.add(tensors, tensor_attributes(module))
    finally:
        for name, key in tensor_attributes(module):
            if (name, key) in tensors:
                children[name].__dict__[key] = tensors[name, key]
            else:
                del children[name].__dict__[key]
    what = (
        "writes to buffers",
        "changes attributes of its modules",
        "draws Python's random numbers",
        "draws NumPy's random numbers",
    )
    found = [name for name, b, a in zip(what, before, outside(), strict=True) if a != b]
    if found:
        raise _refused(" and ".join(found))


def _refused(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"compile=True: a forward of the model or loss {what}, which a graph would do once and never again. Expected "
        "a forward that changes nothing, and torch's random numbers. Train with compile=False."
    )
