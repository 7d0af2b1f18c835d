"""One use of a parameter: the operation in which it met data, what it met, and the gradient that came back.

A use asks its operation for a rule, and a rule takes uses. These types need each other, so one file defines them.

Axes: B units of privacy (examples, unless an owner says otherwise), R rows, T positions, I and O features.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, overload

import torch
from torch import Tensor

from privet.gradients.derived import Derivation
from privet.gradients.rows import row_norms, weighted_rows

__all__ = ["Allowance", "Operation", "Owner", "Recorded", "Rule", "Use", "UseSink", "Uses"]


@dataclass(frozen=True, eq=False)
class Owner:
    """Maps the R rows of a batch to the B units whose privacy is protected.

    `index` is None where row i belongs to unit i; else it is a `(R,)` integer tensor. `share` is what the sum over the
    rows of each unit is multiplied by, such as one over their number for an average; 1 where it is None.
    """

    units: int
    index: Tensor | None = None
    share: Tensor | None = None  # (B,)

    @staticmethod
    def of_rows(index: Tensor, *, average: bool, device: torch.device) -> Owner:  # (R,), from 0, ascending, on the CPU
        """Returns the owner of rows that are added up for each unit, or averaged."""
        rows = torch.bincount(index)
        share = rows.double().reciprocal().to(device) if average else None
        return Owner(len(rows), index.to(device), share)

    def weighted(self, values: Tensor, power: int = 1) -> Tensor:  # (..., B)
        """Returns values of the units, such as their norms, times a power of the share of each."""
        return values if self.share is None else values * self.share.to(values.dtype) ** power


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

    def selected(self, rows: Tensor) -> Use:  # rows: (R',) int
        """Returns the use of some rows alone, copied."""
        data = tuple(None if d is None else d.index_select(0, rows) for d in self.data)
        return replace(self, data=data, gradient=self.gradient.index_select(0, rows))

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
    weighted sum does not form them again. It keeps them only as far as the allowance goes, which all parameters of one
    step share.
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

    def remembered(self, compute: Callable[[], Tensor]) -> Tensor:  # (R, *shape)
        """Keeps the per-row gradients that `compute` forms, if the allowance permits, and returns them.

        Gradients that were kept before are returned as they are. Where the allowance is too small, the weighted sum
        forms them a second time: that costs time, and never a result.
        """
        if self.rows_memo is not None:
            return self.rows_memo
        rows = compute()
        size = rows.numel() * rows.element_size()
        if size <= self.allowance.left:
            self.rows_memo = rows
            self.allowance.left -= size
        return rows

    # None of the three below keeps rows of its own: no weighted sum comes after their norms.

    def narrowed(self, start: int, stop: int) -> Uses:
        """Returns the uses of some rows alone, for gradients that are formed and used at once: nothing is kept."""
        return Uses(tuple(use.narrowed(start, stop) for use in self.items), allowance=Allowance(0))

    def selected(self, rows: Tensor) -> Uses:  # (R',) int
        """Returns the uses of some rows alone, copied, for gradients that are formed and used at once."""
        return Uses(tuple(use.selected(rows) for use in self.items), allowance=Allowance(0))

    def masked(self, dropped: Tensor) -> Uses:  # (R,) bool
        """Returns the uses without the dropped rows' values, for a weighted sum. See `Use.masked`.

        Rows that were kept stay the rows whose norms were taken. They are copied: those of a dropped row may be NaN,
        which no weight makes zero.
        """
        memo = self.rows_memo
        if memo is not None:
            memo = memo.masked_fill(dropped.view(-1, *[1] * (memo.dim() - 1)), 0)
        return Uses(tuple(use.masked(dropped) for use in self.items), memo, allowance=Allowance(0))


class UseSink(Protocol):
    """Takes the uses of a forward, as its backward brings them."""

    def put(self, target: str | Derivation, use: Use) -> None:
        """Takes one use of a parameter, given by its name, or of a tensor derived from parameters."""

    def done(self) -> None:
        """Takes note that the backward is over: it brought all of its uses."""


@dataclass(eq=False)
class Recorded:
    """What one backward brought: the uses by parameter name, and by derivation, and how many examples there were.

    It is the sink that keeps everything.
    """

    examples: int | None = None
    direct: dict[str, list[Use]] = field(default_factory=dict)
    derived: dict[Derivation, list[Use]] = field(default_factory=dict)

    def put(self, target: str | Derivation, use: Use) -> None:
        """Keeps one use."""
        if isinstance(target, str):
            self.direct.setdefault(target, []).append(use)
        else:
            self.derived.setdefault(target, []).append(use)

    def done(self) -> None:
        """Does nothing: everything was kept as it came."""

    @property
    def held(self) -> int:
        """Returns how many bytes of memory the uses keep of their examples, what several of them share counted once."""
        held: dict[int, int] = {}
        for use in itertools.chain(*self.direct.values(), *self.derived.values()):
            for t in (use.gradient, *use.data):
                if t is None:
                    continue
                size, key = t.numel() * t.element_size(), id(t)
                if type(t) is Tensor:  # others, such as one that another process still sends, have no memory to ask for
                    memory = t.untyped_storage()  # may be a larger batch's, or repeat one number
                    size, key = min(size, memory.nbytes()), memory.data_ptr()
                held[key] = max(size, held.get(key, 0))
        return sum(held.values())


class Rule(ABC):
    """Per-example gradients of one role of one operation, as pure functions of a parameter's uses.

    Only `per_example` is needed. The other two say the same more cheaply, where there is a cheaper way. Uses of one
    call are of one parameter and share this rule; several uses add up to one gradient *before* any norm is taken.

    Many calls share one rule, so it keeps no state of any of them. What it needs to know of a call is in the `Use`: its
    data, its gradient, and `use.operation`.
    """

    @abstractmethod
    def per_example(self, uses: Uses) -> Tensor:  # (R, *shape)
        """Returns the gradient of each row, the sum over the uses."""

    def squared_norms(self, uses: Uses) -> Tensor:  # (R,)
        """Returns the squared norm of each row's gradient, never rounded down beyond `1e-6` of itself."""
        return row_norms(uses.remembered(lambda: self.per_example(uses)))

    def weighted_sum(self, uses: Uses, weights: Tensor) -> Tensor:  # (R,) -> shape
        """Returns the sum of the rows' gradients, each times its weight."""
        # Rows that the norms kept are used again. Fresh ones are not kept: this is the last time that they are needed.
        rows = self.per_example(uses) if uses.rows_memo is None else uses.rows_memo
        return weighted_rows(rows, weights)

    def rounding(self, uses: Uses) -> Tensor | None:  # (R,)
        """Returns a bound on the norm of the rounding error of each row's gradient, or None.

        A rule says it if it forms weighted sums from factors, and not from the very rows whose norms were taken. The
        two are rounded differently, by a share of the sizes of the terms, and the norms are padded for both.
        """
        return None

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

    One object is one call. `forward` may leave on `self` what `saved`, `data_gradients` and the rules need later, such
    as the statistics of a normalisation. So a handler makes a new operation for every call, and never shares one
    between two calls: the second forward would overwrite what the first backward needs. Where an operation is run
    again, as activation checkpointing does, the model calls again and a new object is made.
    """

    positionwise: ClassVar[bool] = False
    bilinear: ClassVar[bool] = False
    """Whether it is linear in its one tensor of data, and in its parameter "weight", but for a bias that is added."""
    sequences: ClassVar[bool] = False
    """Whether its rules take positions on any number of axes, so that rows of one owner may be further positions."""
    repeatable: ClassVar[bool] = True
    """Whether `forward` may be run again, under autograd, and is all there is of the operation."""
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

    def keep(self, values: Mapping[str, Tensor]) -> None:  # noqa: B027 - most rules need no value of a parameter
        """Copies the parameters' values that rules need later: their memory is let go of when the backward is over."""

    def saved(self, data: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Returns what the rules need of the data: None in place of what they do not."""
        return data

    def use(self, role: str, data: tuple[Tensor | None, ...], gradient: Tensor, shape: tuple[int, ...]) -> Use:
        """Returns the use of one parameter, once the gradient of the output has come."""
        return Use(self, role, data, gradient, shape)
