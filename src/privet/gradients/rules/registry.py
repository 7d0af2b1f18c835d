"""Which operation has which rule: the table that capture looks into, and the decorators that write it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from privet.gradients.use import of_type, wide

if TYPE_CHECKING:
    from privet.gradients.layout import Layout
    from privet.gradients.use import Uses

__all__ = [
    "Call",
    "Handler",
    "Operation",
    "Rule",
    "apart_handler_of",
    "handler_of",
    "handles",
    "row_norms",
    "structural_handler_of",
    "weighted_rows",
]


def row_norms(rows: Tensor) -> Tensor:  # (R, *shape) -> (R,)
    """Returns the squared norm of each row, summed in chunks of 1024 so that float32 loses nothing that matters.

    One long float32 reduction errs by up to 3e-3 on rows of 3 million entries; chunks stay at about 1e-7.
    """
    flat = wide(_matrix(rows))
    length = flat.shape[1]
    whole = length - length % 1024
    if whole == 0 or flat.shape[0] == 0:
        short: Tensor = torch.linalg.vector_norm(flat, dim=1).square()
        return short
    chunks = flat[:, :whole].reshape(len(flat), -1, 1024)
    squares: Tensor = torch.linalg.vector_norm(chunks, dim=2).square().sum(1)
    if whole < length:
        squares = squares + torch.linalg.vector_norm(flat[:, whole:], dim=1).square()
    return squares


def weighted_rows(rows: Tensor, weights: Tensor) -> Tensor:  # (R, *shape), (R,) -> shape
    """Returns the weighted sum of rows."""
    flat = _matrix(rows)
    total = torch.mv(flat.t(), of_type(weights, flat.dtype))
    return total if flat is rows else total.view(rows.shape[1:])


def _matrix(rows: Tensor) -> Tensor:  # (R, *shape) -> (R, N)
    return rows if rows.dim() == 2 else rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))


class Rule(ABC):
    """Per-example gradients of one role of one operation, as pure functions of a parameter's uses.

    Only `per_example` is needed. The other two say the same more cheaply, where there is a cheaper way. Uses of one
    call are of one parameter and share this rule; several uses add up to one gradient *before* any norm is taken.
    """

    @abstractmethod
    def per_example(self, uses: Uses) -> Tensor:  # (R, *shape)
        """Returns the gradient of each row, the sum over the uses."""

    def squared_norms(self, uses: Uses) -> Tensor:  # (R,)
        """Returns the squared norm of each row's gradient, never rounded down beyond `1e-6` of itself."""
        return row_norms(uses.remembered(lambda: self.per_example(uses)))

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:  # (R,) -> shape
        """Returns the sum of the rows' gradients, each times its weight."""
        return weighted_rows(uses.remembered(lambda: self.per_example(uses)), weights)

    # A parameter with uses of two rules (a table that is also the last layer) has the sum of both gradients, whose norm
    # needs their inner product. One rule offers its gradients as products of two factors, the other takes them.

    def factors(self, uses: Uses) -> tuple[Tensor, Tensor] | None:  # (R, T, O), (R, T, I)
        """Returns left and right such that row i's gradient is `left_i^T right_i`, or None if it is no such product."""
        return None

    def inner_products(self, uses: Uses, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor] | None:  # (R,), (R,)
        """Returns each row's inner product with `left_i^T right_i` and the sum of its terms' sizes, or None."""
        return None


class Operation(ABC):
    """One operation with its constants: how to run it, the gradients of its data, and a rule for each role.

    `data` are what varies with the examples, rows first; `values` are the parameters' values by role. An operation is
    `positionwise` if it treats every index of the axes before the last the same, so that the batch may be any of them:
    its uses then come with the examples on axis 0 and all other axes as positions, `(B, ..., I)` and `(B, ..., O)`.
    """

    positionwise: ClassVar[bool] = False
    rules: Mapping[str, Rule]

    @abstractmethod
    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Any:  # (R, ...)
        """Returns the operation's output, a tensor or a tuple of tensors. Runs without autograd."""

    @abstractmethod
    def data_gradients(
        self,
        data: Sequence[Tensor],
        values: Mapping[str, Tensor],
        gradient: Any,  # (R, ...) of the output, a tuple if the output is one
        needed: Sequence[bool],  # which of the data want a gradient
    ) -> Sequence[Tensor | None]:
        """Returns the gradient of each of the data that wants one, else None."""

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns what the rules need of the data: None in place of what they do not."""
        return data


class Call(Protocol):
    """What a handler may ask of the capture that called it (implemented in `capture.py`)."""

    def is_root(self, value: object) -> bool:
        """Returns whether `value` is a watched parameter, or derived from watched parameters alone."""

    def label(self, root: Tensor) -> str:
        """Returns a parameter's name, or a derived tensor's label, for messages."""

    def layout(self, t: Tensor) -> Layout:
        """Returns how the examples lie in `t`, a tensor argument of the operation being handled."""

    def layout_of_result(self, func: Callable[..., Any], root: Tensor, result: Tensor) -> Layout:
        """Returns how the examples lie in a result made from `root` alone, as by `expand`."""

    def apply(
        self,
        operation: Operation,
        data: Sequence[Tensor],
        roots: Mapping[str, Tensor | None],
        *,
        layout: Layout | None = None,
    ) -> Any:
        """Returns the operation's output; its uses are recorded when the gradient comes back."""

    def again(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `func(...)` with capture looking at it, for handlers that take an operation apart."""


Handler = Callable[[Call, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_HANDLERS: dict[Any, Handler] = {}
_STRUCTURAL: set[Any] = set()
_APART: set[Any] = set()


def handles(*functions: Any, structural: bool = False, apart: bool = False) -> Callable[[Handler], Handler]:
    """Returns a decorator that makes a handler answer for torch functions, such as `torch.nn.functional.linear`.

    A handler gets the call as the user wrote it. It returns the result, or NotImplemented where it does not know this
    form of the call: then the vmap fallback takes it. A `structural` handler only takes the call apart, into operations
    on parameters that are then looked at by themselves; it is in use where vmap takes the place of every rule, too.
    One that takes it `apart` is asked before anything is said of how the examples lie in the arguments: some of them
    have no batch axis until it has rearranged them.
    """

    def register(handler: Handler) -> Handler:
        for function in functions:
            _HANDLERS[function] = handler
            (_STRUCTURAL.add if structural else _STRUCTURAL.discard)(function)
            (_APART.add if apart else _APART.discard)(function)
        return handler

    return register


def handler_of(function: Any) -> Handler | None:
    """Returns the handler of a torch function, or None."""
    return _HANDLERS.get(function)


def apart_handler_of(function: Any) -> Handler | None:
    """Returns the handler of a torch function if it rearranges the arguments first, or None."""
    return handler_of(function) if function in _APART else None


def structural_handler_of(function: Any) -> Handler | None:
    """Returns the handler of a torch function if it only takes the call apart, or None."""
    return handler_of(function) if function in _STRUCTURAL else None
