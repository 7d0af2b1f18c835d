"""Which operation has which rule: the table that capture looks into, and the decorators that write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from privet.gradients.layout import Layout
from privet.gradients.use import Operation

__all__ = [
    "Call",
    "Handler",
    "apart_handler_of",
    "handler_of",
    "handles",
    "structural_handler_of",
]


class Call(Protocol):
    """What a handler may ask of the capture that called it (implemented by `Capture`)."""

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

    def require_alike(self, name: str, data: Tensor, sizes: Tensor | None, firsts: Sequence[Tensor]) -> None:
        """Raises unless it is known whose the rows of a recurrent layer's data are, and its first states lie alike."""

    def lies_as(self, t: Tensor, like: Tensor) -> Tensor:
        """Returns `t`, whose rows have the owners of the rows of `like`, if these were moved along the batch."""

    def by_example(self, rows: Tensor) -> Tensor | None:
        """Returns rows of known owners by example (B, L, ...), filled up with zeros, or None of other tensors."""

    def as_rows(self, t: Tensor, like: Tensor) -> Tensor:
        """Returns what is by example (B, L, ...) in the order of the rows of `like`, with their owners."""

    def again(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `func(...)` with capture looking at it, for handlers that take an operation apart."""


Handler = Callable[[Call, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_HANDLERS: dict[Any, Handler] = {}
_STRUCTURAL: set[Any] = set()
_APART: set[Any] = set()


def handles(*functions: Any, structural: bool = False, apart: bool = False) -> Callable[[Handler], Handler]:
    """Returns a decorator that makes a handler answer for torch functions, such as `torch.nn.functional.linear`.

    An operator of another library is given by its name, `"library::operator"`, so that the library is not imported.

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
    """Returns the handler of a torch function, or of an operator that a library has registered, or None."""
    found = _HANDLERS.get(function)
    return found if found is not None else _HANDLERS.get(getattr(function, "_qualified_op_name", None))


def apart_handler_of(function: Any) -> Handler | None:
    """Returns the handler of a torch function if it rearranges the arguments first, or None."""
    return handler_of(function) if function in _APART else None


def structural_handler_of(function: Any) -> Handler | None:
    """Returns the handler of a torch function if it only takes the call apart, or None."""
    return handler_of(function) if function in _STRUCTURAL else None
