"""A linear layer on a part of its inputs: the results of all processes are added up, the bias among them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from privet.gradients.rules.linear import Linear
from privet.gradients.rules.registry import Call, handles

__all__ = ["partial_linear"]


def partial_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, adds_bias: bool) -> Tensor:  # noqa: A002
    """Returns the product of some inputs and their columns of the weight, and adds the bias if it is this one's turn.

    Shapes: input (..., I'), weight (O, I'), bias (O,), I' being the inputs of this process. The sum over all processes
    is the layer's output, so that the gradient with respect to each part of it is that of the whole.
    """
    return F.linear(input, weight, bias if adds_bias else None)


class _PartialLinear(Linear):
    """The gradient of the bias is whole here, whether it is added here or elsewhere."""

    def __init__(self, *, adds_bias: bool) -> None:
        super().__init__()
        self._adds_bias = adds_bias

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the product, and the bias added if it is this one's turn."""
        return partial_linear(data[0], values["weight"], values.get("bias"), adds_bias=self._adds_bias)


@handles(partial_linear)
def _partial_linear(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = args
    return call.apply(_PartialLinear(**kwargs), (x,), {"weight": weight, "bias": bias})
