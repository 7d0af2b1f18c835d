"""A trace of the operations of one forward that sees at which rows their gradients arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from privet.gradients.turned import by_row

__all__ = ["RowsSeen"]


class RowsSeen(list[Any]):
    """A trace that also says at which rows of each operation a gradient arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: list[tuple[Any, Tensor]] = []  # the entry of the trace, and truth values along its axis

    def watch(self, result: Any, places: Iterable[int]) -> None:
        """Looks at the gradient of what an operation returned, whose arguments are at these places of the trace."""
        met = [self[place] for place in places]

        def arrived(gradient: Tensor) -> None:
            for entry in met:
                axis = entry[2].axis
                if gradient.dim() > axis:
                    self.reached.append((entry, by_row(gradient.detach().movedim(axis, 0)).ne(0).any(1)))

        first = result[0] if isinstance(result, tuple | list) else result
        if met and isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(arrived)  # type: ignore[no-untyped-call]
