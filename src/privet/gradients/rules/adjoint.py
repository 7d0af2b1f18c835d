"""The gradient of an operation's data, as an operation of its own: what a gradient of a gradient is made of.

A loss may contain a gradient: a penalty on the gradient of the output, or a force, which is the gradient of an energy.
The backward that forms it multiplies by the parameters once more, and each such product is one more use of them. So the
way back through an operation is an operation itself, with a rule for each parameter in it.

* A map that is linear in its data and in its weight, `y = W x`, has the way back `W^T g`, which is linear in both too.
  If `v` is the gradient of its output, then the gradient of `W` is that of `y = W v` for the output gradient `g`. So
  the rule of the operation itself knows it, with data and gradient exchanged.
* Any other operation is run again under autograd, and its way back is mapped over the examples.

Both are captured like any other operation, and so may be differentiated once more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from privet.errors import UnsupportedModelError
from privet.gradients.rows import of_type
from privet.gradients.rules.functional import Mapped
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Use

__all__ = ["BilinearAdjoint", "adjoint_of", "refuse_twice"]


def refuse_twice(name: str, way_on: str) -> None:
    """Raises if the backward that runs is to be differentiated, and goes through what is known to the first derivative.

    Args:
        name: of what it goes through.
        way_on: what to do.
    """
    if torch.is_grad_enabled():
        raise UnsupportedModelError(
            f"a gradient taken with create_graph=True goes through {name}, of which privet knows the first derivative "
            f"alone. Expected operations whose backward can be differentiated for each example. {way_on}"
        )


class BilinearAdjoint(Operation):
    """The way back through an operation that is linear in its data and in its weight.

    Args:
        operation: whose data get a gradient.
        data: what it met, of which only the shape and the type count.
    """

    def __init__(self, operation: Operation, data: Tensor) -> None:
        self.operation = operation
        self._data = data.detach()
        self._dtype = data.dtype  # of the gradient that goes through, once `forward` has seen it
        self.positionwise = operation.positionwise  # type: ignore[misc]
        self.rules = {"weight": operation.rules["weight"]}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the gradient of the operation's data, for that of its output."""
        self._dtype = data[0].dtype
        (found,) = self.operation.data_gradients((self._data,), values, data[0], (True,))
        assert found is not None
        return found

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns what the operation, without its bias, makes of the gradient."""
        weight = of_type(values["weight"], self._dtype)
        return [self.operation.forward((of_type(gradient, self._dtype),), {"weight": weight})]

    def use(self, role: str, data: tuple[Tensor | None, ...], gradient: Tensor, shape: tuple[int, ...]) -> Use:
        """Returns the use as one of the operation itself, with data and gradient exchanged."""
        (met,) = data
        assert met is not None
        return self.operation.use(role, (of_type(gradient, met.dtype),), met, shape)


class _MappedPositionwise(Mapped):
    """The way back through an operation that treats every position the same."""

    positionwise = True


def adjoint_of(
    operation: Operation,
    data: Sequence[Tensor],
    values: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    wanted: Sequence[int],
    *,
    name: str,
) -> tuple[Operation, tuple[Tensor, ...], tuple[str, ...]]:
    """Returns the way back through an operation, what it meets, and the roles of the parameters in it.

    Args:
        operation: whose data get gradients.
        data: what it met.
        values: the parameters' values by role.
        gradients: of its outputs.
        wanted: which of the data get a gradient: the outputs of what is returned, one tensor or a tuple.
        name: of the operation with its parameters, for messages.

    Raises:
        UnsupportedModelError: if it is not known how the operation depends on its parameters.
    """
    if isinstance(operation, BilinearAdjoint):  # whose way back is the operation, without its bias
        return operation.operation, tuple(gradients), ("weight",)
    if operation.bilinear:
        return BilinearAdjoint(operation, data[0]), tuple(gradients), ("weight",)
    if not operation.repeatable:
        refuse_twice(name, "Write the module with torch's own operations, without a rule of its own (register_rule).")
    count = len(data) + len(gradients)
    leaves: list[tuple[str, Any]] = [
        *(("data", k) for k in range(count)),
        *(("value", role) for role in sorted(values)),
    ]
    tree = tree_flatten((([0] * count, dict.fromkeys(sorted(values), 0)), {}))[1]
    pulled = _pulled_back(operation, len(data), tuple(wanted))
    if isinstance(operation, Mapped):
        kind, layout = type(operation), operation.layout
        found: Operation = kind(pulled, leaves, tree, f"the gradient of {name}", layout=layout)
    else:
        kind = _MappedPositionwise if operation.positionwise else Mapped
        found = kind(pulled, leaves, tree, f"the gradient of {name}")
    return found, (*data, *gradients), tuple(values)


def _pulled_back(operation: Operation, count: int, wanted: tuple[int, ...]) -> Callable[..., Any]:
    """Returns a function of data, output gradients and values that forms the gradients of the data."""

    def pulled(tensors: Sequence[Tensor], values: Mapping[str, Tensor]) -> Any:
        data, gradients = list(tensors[:count]), tensors[count:]

        def of_data(*chosen: Tensor) -> tuple[Tensor, ...]:
            for k, t in zip(wanted, chosen, strict=True):
                data[k] = t
            output = copy.copy(operation).forward(data, values)  # a copy: what it keeps of this run is of no use
            return output if isinstance(output, tuple) else (output,)

        outputs, pullback = torch.func.vjp(of_data, *(data[k] for k in wanted))[:2]
        found = pullback(tuple(of_type(g, o.dtype) for g, o in zip(gradients, outputs, strict=True)))
        return found[0] if len(found) == 1 else tuple(found)

    return pulled


@handles(torch.autograd.grad, torch.autograd.backward, apart=True)
def _of_parameters(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise UnsupportedModelError(
        f"torch.autograd.{func.__name__} was asked inside of the forward or the loss for the gradient of a parameter, "
        "which is a sum over all examples. Expected gradients with respect to data or activations: "
        "torch.autograd.grad(y, x, create_graph=True). A penalty on gradients of parameters, or a step inside of the "
        "loss, mixes the examples."
    )
