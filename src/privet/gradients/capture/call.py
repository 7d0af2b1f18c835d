"""One captured operation as autograd sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from privet.gradients.capture.routing import Routed
from privet.gradients.derived import Derivation
from privet.gradients.layout import Layout
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation

__all__ = ["CapturedCall", "CapturedOperation", "Recorder", "tensors_among"]


def tensors_among(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples and dicts of arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_among(value)
        elif isinstance(value, dict):
            yield from tensors_among(value.values())


class Recorder(Protocol):
    """Whoever is told of each use when its gradient has come."""

    def record(
        self, call: CapturedCall, data: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Records the uses of one operation."""


@dataclass(eq=False)
class CapturedCall:
    """All of one captured operation that is not a tensor."""

    capture: Recorder
    cycle: object  # the forwards it is part of: a token, for what they recorded would hold the graph that holds it
    operation: Operation
    layout: Layout
    routed: Routed | None  # where the layout says so
    examples: int
    roles: tuple[str, ...]  # of the values, in order
    targets: dict[str, str | Derivation]  # role -> what is to be given a gradient
    data_count: int


class CapturedOperation(torch.autograd.Function):
    """Runs an operation without autograd, gives the data their gradients, and hands the rest to the capture.

    The last argument is a parameter of the model. It gets no gradient; it makes the output a part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, call: CapturedCall, *tensors: Tensor) -> Any:
        """Returns the operation's output."""
        data, values = tensors[: call.data_count], tensors[call.data_count : -1]
        ctx.call = call
        ctx.save_for_backward(*data, *values)
        output = call.operation.forward(data, dict(zip(call.roles, values, strict=True)))
        # A fresh result that is a view of another fresh one (as linear's is) must allow in-place activations.
        fresh_view = call.data_count and isinstance(output, Tensor) and output._is_view()  # noqa: SLF001
        if fresh_view:
            return output.clone() if tracing() else output.data  # a graph knows nothing of `data`
        return output

    @staticmethod
    @once_differentiable  # a gradient of a gradient would miss the parameters, without a word
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Returns the data's gradients; those of the parameters are None."""
        call: CapturedCall = ctx.call
        saved = ctx.saved_tensors  # may recompute a checkpointed part, which has to be watched
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            data, values = saved[: call.data_count], saved[call.data_count :]
            call.capture.record(call, data, values, gradients)
            needed = ctx.needs_input_grad[1 : 1 + call.data_count]
            results: Sequence[Tensor | None] = (None,) * call.data_count
            if any(needed):
                by_role = dict(zip(call.roles, values, strict=True))
                gradient = gradients[0] if len(gradients) == 1 else gradients
                results = call.operation.data_gradients(data, by_role, gradient, needed)
        return (None, *results, *(None for _ in values), None)
