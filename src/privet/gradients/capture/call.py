"""One captured operation as autograd sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.routing import Routed
from privet.gradients.derived import Derivation
from privet.gradients.given import added_up
from privet.gradients.layout import Layout
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation, Use

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
    """Takes the uses of a captured operation when its gradient has come (implemented by `Capture`)."""

    def record(
        self, call: CapturedCall, data: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Records the uses of one operation."""


@dataclass(eq=False)
class CapturedCall:
    """All of one captured operation that is not a tensor."""

    capture: Recorder
    cycle: Cycle  # the forwards that it is part of
    operation: Operation
    layout: Layout
    routed: Routed | None  # the owners of the rows, where the layout is ROUTED
    batch_first: bool  # whether axes merged with the batch have the batch outside
    roles: tuple[str, ...]  # of the values, in order
    targets: dict[str, str | Derivation]  # role -> the parameter, or derived tensor, whose use is recorded
    data_count: int
    add_up: Callable[[Tensor], Tensor] | None = None  # of rows that are spread over processes

    def examples_first(self, t: Tensor) -> Tensor:
        """Returns data, or a gradient, with the examples on axis 0 as the operation's rules expect them."""
        if self.routed is not None:
            return self.routed.examples_first(t, self.cycle.examples)
        if self.operation.positionwise:
            return self.layout.examples_first(t, self.cycle.examples, batch_first=self.batch_first)
        # Other operations keep their rows as rows. Several rows of one example have to lie together.
        if self.layout is Layout.MERGED and not self.batch_first:
            return t.reshape(-1, self.cycle.examples, *t.shape[1:]).movedim(1, 0).flatten(0, 1)
        return t

    def uses(
        self, data: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> list[tuple[str | Derivation, Use]]:
        """Returns each target of the operation with its use."""
        operation = self.operation
        kept = [None if t is None else self.examples_first(t) for t in operation.saved(data)]
        gradient = self.examples_first(gradients[0].detach())
        # An operation of several outputs has one gradient for each: the others follow the data.
        kept.extend(self.examples_first(g.detach()) for g in gradients[1:])
        met = tuple(kept)
        shapes = {role: tuple(v.shape) for role, v in zip(self.roles, values, strict=True)}
        found = [(target, Use(operation, role, met, gradient, shapes[role])) for role, target in self.targets.items()]
        return found if self.add_up is None else [(target, added_up(use, self.add_up)) for target, use in found]


class CapturedOperation(torch.autograd.Function):
    """Runs an operation without autograd, gives the data their gradients, and hands the uses to the capture.

    The last argument is a parameter of the model. It gets no gradient; it makes the output a part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, call: CapturedCall, *tensors: Tensor) -> Any:
        """Runs the operation, and returns its output."""
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
        """Records the operation's uses, and returns the gradients of the data. Parameters get None."""
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
