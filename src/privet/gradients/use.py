"""One use of a parameter: the operation in which it met data, what it met, and the gradient that came back.

Axes: B units of privacy (examples, unless an owner says otherwise), R rows, T positions, I and O features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from privet.gradients.rules.registry import Operation, Rule

__all__ = ["Allowance", "Owner", "Use", "Uses", "of_type", "wide"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Owner:
    """Maps the R rows of an activation to the B units whose privacy is protected.

    `index` is None where row i belongs to unit i; else it is a `(R,)` integer tensor.
    """

    units: int
    index: Tensor | None = None

    def gather(self, weights: Tensor) -> Tensor:  # (B,) -> (R,)
        """Returns the weight of each row's owner."""
        return weights if self.index is None else weights[self.index]

    def scatter_sum(self, rows: Tensor) -> Tensor:  # (R, *shape) -> (B, *shape)
        """Returns the sum of each owner's rows."""
        if self.index is None:
            return rows
        return rows.new_zeros(self.units, *rows.shape[1:]).index_add_(0, self.index, rows)


@dataclass(frozen=True, eq=False)
class Use:
    """One operation in which a parameter met data. All tensors have the rows on their first axis."""

    operation: Operation
    role: str  # which argument of the operation the parameter was: "weight", "bias", ...
    data: tuple[Tensor | None, ...]  # what the parameter met, (R, ...) each
    gradient: Tensor  # (R, ...): of the loss with respect to the operation's output
    shape: tuple[int, ...]  # of the parameter

    @property
    def rows(self) -> int:
        """Returns R."""
        return self.gradient.shape[0]

    @property
    def rule(self) -> Rule:
        """Returns the rule that knows this operation's per-example gradients."""
        return self.operation.rules[self.role]

    def narrowed(self, start: int, stop: int) -> Use:
        """Returns the use of the rows from `start` to `stop` alone."""
        data = tuple(None if d is None else d[start:stop] for d in self.data)
        return replace(self, data=data, gradient=self.gradient[start:stop])

    def masked(self, dropped: Tensor) -> Use:  # dropped: (R,) bool
        """Returns the use with every value of the dropped rows set to zero, NaN and infinity included."""

        def zeroed(t: Tensor | None) -> Tensor | None:
            if t is None or not t.is_floating_point():
                return t
            return t.masked_fill(dropped.view(-1, *[1] * (t.dim() - 1)), 0)

        gradient = zeroed(self.gradient)
        assert gradient is not None
        return replace(self, data=tuple(zeroed(d) for d in self.data), gradient=gradient)


@dataclass(eq=False)
class Allowance:
    """How many bytes of per-example gradients may still be kept from the norms to the weighted sums of one step."""

    left: int = 768 * 2**20


@dataclass(eq=False)
class Uses(Sequence[Use]):
    """The uses of one parameter that share one rule, and what their rule wants to remember between two calls.

    A rule that has to instantiate per-example gradients to know their norms keeps them in `rows_memo`, so that the
    weighted sum does not form them again.
    """

    items: tuple[Use, ...]
    rows_memo: Tensor | None = field(default=None, repr=False)
    allowance: Allowance = field(default_factory=Allowance, repr=False)

    @overload
    def __getitem__(self, index: int) -> Use: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Use, ...]: ...

    def __getitem__(self, index: int | slice) -> Use | tuple[Use, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Use]:
        return iter(self.items)

    @property
    def rule(self) -> Rule:
        """Returns the rule of all these uses."""
        return self.items[0].rule

    @property
    def rows(self) -> int:
        """Returns R."""
        return self.items[0].rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the parameter's shape."""
        return self.items[0].shape

    def remembered(self, compute: Callable[[], Tensor]) -> Tensor:
        """Returns the per-row gradients, computed once."""
        if self.rows_memo is None:
            self.rows_memo = compute()
            self.allowance.left -= self.rows_memo.numel() * self.rows_memo.element_size()
        return self.rows_memo

    def narrowed(self, start: int, stop: int) -> Uses:
        """Returns the uses of some rows alone."""
        return Uses(tuple(use.narrowed(start, stop) for use in self.items))

    def masked(self, dropped: Tensor) -> Uses:
        """Returns the uses without the dropped rows' values; see `Use.masked`."""
        return Uses(tuple(use.masked(dropped) for use in self.items))


def wide(t: Tensor) -> Tensor:
    """Returns `t` in float32 at least: norms and sums never accumulate in half precision."""
    return t.float() if t.dtype in _HALF else t


def of_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `t.to(dtype)`, without the call where there is nothing to do: most of a small step is such calls."""
    return t if t.dtype == dtype else t.to(dtype)
