"""Where the examples are in a tensor that met a parameter: the batch axis, told and not guessed.

A shape alone is ambiguous: in a batch of 64, `torch.arange(64)` of positions looks like 64 examples. So a site (this
operation on this parameter) is looked at twice before training, with B rows and with B + 1: the axis that grew is the
batch axis, and an axis that did not is none. What was learned is kept and held to for the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from privet.errors import UnsupportedModelError

__all__ = ["Layout", "Layouts", "Site", "Trace"]


class Layout(Enum):
    """How the examples lie in a tensor of R rows for B examples."""

    CONSTANT = "no axis of it is the batch"
    ROWS = "axis 0 is the batch"
    MERGED = "axis 0 is batch and positions, batch first"
    SECOND = "axis 1 is the batch"
    ROUTED = "rows have owners of their own (rows_of)"

    def examples_first(self, t: Tensor, examples: int, *, batch_first: bool) -> Tensor:  # -> (B, ...)
        """Returns a view of `t` with the examples on axis 0 and all else behind."""
        match self:
            case Layout.ROWS:
                return t
            case Layout.SECOND:
                return t.movedim(1, 0)
            case Layout.MERGED if batch_first:
                return t.reshape(examples, -1, *t.shape[1:])
            case Layout.MERGED:
                return t.reshape(-1, examples, *t.shape[1:]).movedim(1, 0)
            case Layout.CONSTANT | Layout.ROUTED:
                raise AssertionError(f"where the examples are is not told by a layout: {self.value}")


class Site(NamedTuple):
    """One tensor argument of one operation on one parameter."""

    operation: Any
    roots: tuple[str, ...]
    argument: int
    axes: int

    def __str__(self) -> str:
        name = getattr(self.operation, "__name__", str(self.operation))
        return f"argument {self.argument} of {name} with parameter {', '.join(self.roots)}"


Trace = list[tuple[Site, tuple[int, ...], Layout]]
"""The sites that one forward met while layouts are learned, in order: their shapes, and how they were decided."""


def _compared(site: Site, first: Sequence[int], second: Sequence[int], small: int, large: int) -> Layout:
    """Returns the layout that explains both shapes, of the same site seen with `small` and `large` examples."""
    grew = [axis for axis, (n, m) in enumerate(zip(first, second, strict=True)) if n != m]
    if not grew:
        return Layout.CONSTANT
    if grew == [0]:
        if (first[0], second[0]) == (small, large):
            return Layout.ROWS
        if first[0] % small == 0 and first[0] // small * large == second[0]:
            return Layout.MERGED
    if grew == [1] and (first[1], second[1]) == (small, large):
        return Layout.SECOND
    raise UnsupportedModelError(
        f"cannot tell which rows belong to which example in {site}: its shape is {tuple(first)} for {small} examples "
        f"and {tuple(second)} for {large}. Expected one axis that grows with the batch: axis 0 (alone, or merged with "
        "positions) or axis 1. Keep the batch on axis 0 there."
    )


@dataclass
class Layouts:
    """What has been learned of every site."""

    known: dict[Site, set[Layout]] = field(default_factory=dict)

    @property
    def learned(self) -> int:
        """Returns how many facts are known."""
        return sum(len(layouts) for layouts in self.known.values())

    def copy(self) -> Layouts:
        """Returns the same knowledge, which what is learned later does not change."""
        return Layouts({site: set(layouts) for site, layouts in self.known.items()})

    def restore(self, earlier: Layouts) -> None:
        """Forgets what was learned since a copy was taken."""
        self.known = earlier.copy().known

    def of(self, site: Site, t: Tensor, examples: int, *, trace: Trace | None = None) -> Layout:
        """Returns the layout of `t` at `site`, in a batch of `examples`; adds it to the trace, if there is one.

        With a trace, layouts are being learned: then a wrong guess is allowed, for it is found out and mended.

        Raises:
            UnsupportedModelError: if it cannot be told, or contradicts what was learned.
        """
        layout = self._decided(site, t, examples, learning=trace is not None)
        if trace is not None:
            trace.append((site, tuple(t.shape), layout))
        return layout

    def _decided(self, site: Site, t: Tensor, examples: int, *, learning: bool) -> Layout:
        known = self.known.get(site, ())
        fits = [layout for layout in known if _fits(layout, t, examples)]
        if len(fits) == 1:
            return fits[0]
        if site not in self.known:
            if self.known and not learning and not t.requires_grad:  # in a batch of T, T positions look like rows
                raise self._untold(site, t, examples)
            return self._guessed(site, t, examples, learning=learning)
        if Layout.CONSTANT in fits and examples == 1 and len(fits) == 2:
            return next(layout for layout in fits if layout is not Layout.CONSTANT)  # one example owns all rows
        raise UnsupportedModelError(
            f"{site} has shape {tuple(t.shape)} in a batch of {examples}. On the first batch it was seen as: "
            f"{', '.join(sorted(layout.value for layout in self.known[site]))}. That "
            f"{'leaves it open which rows are whose' if fits else 'does not fit'}; keep one layout of the batch."
        )

    def _guessed(self, site: Site, t: Tensor, examples: int, *, learning: bool) -> Layout:
        """Returns what the shape alone says, of a site that was not met while learning."""
        if t.dim() and t.shape[0] == examples:
            return Layout.ROWS
        if t.dim() == 0 or (not t.requires_grad and t.shape[0] % examples):
            return Layout.CONSTANT
        if learning:
            if t.dim() > 1 and t.shape[1] == examples:
                return Layout.SECOND
            return Layout.CONSTANT if t.shape[0] % examples else Layout.MERGED
        raise self._untold(site, t, examples)

    @staticmethod
    def _untold(site: Site, t: Tensor, examples: int) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"cannot tell which rows belong to which example in {site}: its shape is {tuple(t.shape)} in a batch of "
            f"{examples}, and it was not met on the first batch. Keep the batch on axis 0, and use the same operations "
            "on every batch."
        )

    def learn(
        self,
        first: Sequence[tuple[Site, tuple[int, ...], Layout]],
        second: Sequence[tuple[Site, tuple[int, ...], Layout]],
        small: int,
        large: int,
    ) -> bool:
        """Learns from two traces of the same model with `small` and `large` examples.

        Returns whether both traces had decided everything as it turned out: if not, trace again, because a wrong
        decision changes what is met after it.
        """
        settled = True
        for (site, shape, decided), (other, other_shape, other_decided) in zip(first, second, strict=False):
            if site != other or len(shape) != len(other_shape):
                return False
            layout = _compared(site, shape, other_shape, small, large)
            self.known.setdefault(site, set()).add(layout)
            settled = settled and decided is layout and other_decided is layout
        return settled and len(first) == len(second)


def _fits(layout: Layout, t: Tensor, examples: int) -> bool:
    match layout:
        case Layout.CONSTANT:
            return True
        case Layout.ROWS:
            return t.dim() > 0 and t.shape[0] == examples
        case Layout.MERGED:
            return t.dim() > 0 and t.shape[0] % examples == 0
        case Layout.SECOND:
            return t.dim() > 1 and t.shape[1] == examples
        case Layout.ROUTED:
            return False  # told each time, and never learned
