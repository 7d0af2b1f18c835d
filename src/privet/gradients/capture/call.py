"""One captured operation as autograd sees it.

A backward that comes while the forward still runs is a part of the forward: the loss contains a gradient, as a penalty
on it does. Nothing is recorded then. If that gradient is to be differentiated (`create_graph=True`), the way back is
captured in its turn (`rules/adjoint.py`), and the backward of the loss brings those uses with all others. Without
`create_graph` the gradient is a constant for the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from privet.errors import UnsupportedModelError
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.functions import APPLY
from privet.gradients.capture.routing import Routed
from privet.gradients.derived import Derivation
from privet.gradients.given import added_up
from privet.gradients.layout import Layout
from privet.gradients.rules.adjoint import adjoint_of
from privet.gradients.tracing import tracing
from privet.gradients.turned import Turned
from privet.gradients.use import Operation, Use

__all__ = ["CapturedCall", "CapturedOperation", "Recorder", "refuse_second_derivative", "tensors_among"]


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
    order: Turned | None  # of the rows, where the layout is TURNED
    roles: tuple[str, ...]  # of the values, in order
    targets: dict[str, str | Derivation]  # role -> the parameter, or derived tensor, whose use is recorded
    data_count: int
    edge: Tensor  # one of the parameters: it makes the output a part of the graph
    lasting: bool = True  # whether the parameters are whole, and stay in memory until the backward is over
    add_up: Callable[[Tensor], Tensor] | None = None  # of rows that are spread over processes

    def examples_first(self, t: Tensor) -> Tensor:
        """Returns data, or a gradient, with the examples on axis 0 as the operation's rules expect them."""
        if self.routed is not None:
            return self.routed.examples_first(t, self.cycle.examples)
        if self.order is not None:
            found = self.order.examples_first(t, self.cycle.examples)
            return found if self.operation.positionwise else found.flatten(0, 1)
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
        found = [(target, operation.use(role, met, gradient, shapes[role])) for role, target in self.targets.items()]
        return found if self.add_up is None else [(target, added_up(use, self.add_up)) for target, use in found]


class CapturedOperation(torch.autograd.Function):
    """Runs an operation without autograd, gives the data their gradients, and hands the uses to the capture.

    The last argument is a parameter of the model. It gets no gradient; it makes the output a part of the graph.
    """

    apply = APPLY  # torch's own, also while Functions are looked at

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
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Records the operation's uses, and returns the gradients of the data. Parameters get None."""
        call: CapturedCall = ctx.call
        saved = ctx.saved_tensors  # may recompute a checkpointed part, which has to be watched
        inner = _is_inner(ctx, call.cycle)
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            data, values = saved[: call.data_count], saved[call.data_count :]
            needed = ctx.needs_input_grad[1 : 1 + call.data_count]
            if inner and torch.is_grad_enabled():
                results: Sequence[Tensor | None] = _captured_again(call, data, values, gradients, needed)
            else:
                if not inner:
                    if not call.cycle.running:
                        refuse_second_derivative()
                    call.capture.record(call, data, values, gradients)
                results = (None,) * call.data_count
                if any(needed):
                    by_role = dict(zip(call.roles, values, strict=True))
                    gradient = gradients[0] if len(gradients) == 1 else gradients
                    results = call.operation.data_gradients(data, by_role, gradient, needed)
        return (None, *results, *(None for _ in values), None)


def refuse_second_derivative() -> None:
    """Raises if the backward that runs is to be differentiated, after the forward that it would have to be part of."""
    if torch.is_grad_enabled():
        raise UnsupportedModelError(
            "a backward with create_graph=True went through the private model, as for a gradient penalty or a force, "
            "after the model's forward had ended: the gradient of that gradient would not be captured for each "
            "example. Expected it inside of loss_per_example at the explicit door, where it is exact: "
            "privet.PrivateStep(model, optimizer=..., mechanism=..., loss_per_example=loss), with torch.autograd.grad("
            "..., create_graph=True) in loss(model, batch); or inside of the model's own forward."
        )


def _is_inner(ctx: Any, cycle: Cycle) -> bool:
    """Returns whether this backward is a part of the forward: one in which no gradient is asked of a parameter."""
    if not cycle.running:
        return False
    try:
        return not torch._C._will_engine_execute_node(ctx.next_functions[-1][0])  # noqa: SLF001 - as torch's own hooks ask
    except RuntimeError:  # the parameter is one of those that torch.autograd.grad was asked about
        return False


def _is_mapped(t: Tensor) -> bool:
    """Returns whether a tensor hides an axis from us, as under vmap."""
    functorch: Any = torch._C._functorch  # noqa: SLF001 - there is no public way to ask
    return bool(functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))


def _captured_again(
    call: CapturedCall,
    data: Sequence[Tensor],
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Returns the gradients of the data that need one, as the outputs of one more captured operation."""
    results: list[Tensor | None] = [None] * call.data_count
    wanted = [k for k, need in enumerate(needed) if need]
    if not wanted:
        return results
    if call.add_up is not None or not call.lasting:
        raise UnsupportedModelError(
            "a gradient was taken with create_graph=True through a model of which each rank holds a part. Expected a "
            "model that is whole on each rank (DistributedDataParallel's way): do not shard it (fully_shard, "
            "parallelize_module)."
        )
    if any(map(_is_mapped, gradients)):
        raise UnsupportedModelError(
            "a gradient was taken with create_graph=True under vmap, which hides the examples. Expected one call of "
            "torch.autograd.grad for each output (no is_grads_batched=True, no vectorize=True)."
        )
    by_role = dict(zip(call.roles, values, strict=True))
    named = f"{type(call.operation).__name__} of {', '.join(map(str, call.targets.values()))}"
    operation, met, roles = adjoint_of(call.operation, data, by_role, gradients, wanted, name=named)
    again = replace(
        call,
        operation=operation,
        roles=roles,
        targets={role: target for role, target in call.targets.items() if role in roles},
        data_count=len(met),
    )
    found = CapturedOperation.apply(again, *met, *(by_role[role] for role in roles), call.edge)
    for k, gradient in zip(wanted, found if isinstance(found, tuple) else (found,), strict=True):
        results[k] = gradient
    return results
