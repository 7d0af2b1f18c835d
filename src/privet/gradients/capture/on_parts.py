"""Operations on parameters of which this process holds a part, as a tensor parallel plan lays them out.

Modules hold distributed tensors, and operations meet these. Rules are told of local tensors alone: each operation is
done by operations on the own parts, which are captured like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.handled import in_backward
from privet.gradients.capture.moved import MovedRows
from privet.gradients.capture.watched import Roots, asks_only
from privet.gradients.spread import Parts

__all__ = ["OnParts"]


class _Capturing(Protocol):
    """What watches the forward (implemented by `Capture`)."""

    roots: Roots
    moved: MovedRows

    @property
    def cycle(self) -> Cycle | None:
        """Returns the forwards whose backward is still to come, or None."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records one operation, and returns its result."""


class OnParts:
    """Has operations on parts done by operations of this process, which a capture records.

    It is what the plans of a model are given to answer with (`spread.LocalCalls`).

    Args:
        capture: records.
        parts: knows the plans of the model; None if no parameter is in parts while an operation meets it.
    """

    def __init__(self, capture: _Capturing, parts: Parts | None) -> None:
        self._capture = capture
        self._parts = parts
        self.add_up: Callable[[Tensor], Tensor] | None = None
        """Adds up the rows of the operation that is recorded now, if its examples are spread over processes."""

    def meet(self, name: str, shown: nn.Parameter) -> None:
        """Takes a tensor of which each process holds a part for a parameter from now on, and watches it."""
        assert self._parts is not None
        self._capture.roots.meet_part(name, shown, self._parts.local(shown))
        if self._capture.cycle is not None:
            self._capture.roots.watch()

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Has one operation on parts done, and returns its result."""
        cycle = self._capture.cycle
        assert self._parts is not None
        assert cycle is not None
        if asks_only(func):
            return func(*args, **kwargs)
        # What was said of a local tensor is not known of the distributed one that was made of it.
        if cycle.doubt is None and not in_backward():
            cycle.doubt = self._capture.moved.doubt_of_all(func)
        return self._parts.answer(func, args, kwargs, self)

    def local(self, value: object) -> nn.Parameter | None:
        """Returns the own part of a private parameter, or None for anything else."""
        return self._capture.roots.local(value)

    def name_of(self, local: nn.Parameter) -> str:
        """Returns a parameter's name, for messages."""
        return self._capture.roots.name(local)

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records one operation of this process, and returns its result."""
        return self._capture.intercept(func, args, kwargs)

    def intercept_shared(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        add_up: Callable[[Tensor], Tensor],
    ) -> Any:
        """Records one operation on examples that are spread over processes, and returns its result."""
        self.add_up = add_up
        try:
            return self._capture.intercept(func, args, kwargs)
        finally:
            self.add_up = None
