"""Where the examples are in a tensor that met a parameter: the batch axis, told and not guessed.

A shape alone is ambiguous: in a batch of 64, `torch.arange(64)` of positions looks like 64 examples. So a site (this
operation on this parameter) is looked at twice before training, with B rows and with B + 1: the axis that grew is the
batch axis, and an axis that did not is none. What was learned is kept and held to for the whole run.

A later batch may meet a site that was never looked at, or one whose known layouts do not decide. Then nothing is
guessed: `DoubtError` is raised. The batch at hand is looked at in the same way, and what was learned of it is `Told` to
a forward that is run anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from privet.errors import UnsupportedModelError
from privet.gradients.turned import Turned, same_order

__all__ = ["DoubtError", "Layout", "Layouts", "Lies", "Site", "Told", "Trace"]


class Layout(Enum):
    """How the examples lie in a tensor of R rows for B examples."""

    CONSTANT = "no axis of it is the batch"
    ROWS = "axis 0 is the batch"
    MERGED = "axis 0 is batch and positions, batch first"
    SECOND = "axis 1 is the batch"
    SECOND_MERGED = "axis 1 is batch and positions, batch first"
    TURNED = "axis 0 is batch and positions, in another order"
    SECOND_TURNED = "axis 1 is batch and positions, in another order"
    ROUTED = "rows have owners of their own"

    @property
    def axis(self) -> int:
        """Returns the axis on which the examples lie, alone or with positions."""
        return 1 if self in (Layout.SECOND, Layout.SECOND_MERGED, Layout.SECOND_TURNED) else 0

    def examples_first(self, t: Tensor, examples: int, *, batch_first: bool) -> Tensor:  # -> (B, ...)
        """Returns a view of `t` with the examples on axis 0 and all else behind."""
        match self:
            case Layout.ROWS:
                return t
            case Layout.SECOND:
                return t.movedim(1, 0)
            case Layout.MERGED if batch_first:
                return t.reshape(examples, t.shape[0] // max(examples, 1), *t.shape[1:])
            case Layout.MERGED:
                return t.reshape(t.shape[0] // max(examples, 1), examples, *t.shape[1:]).movedim(1, 0)
            case Layout.SECOND_MERGED:
                return Layout.MERGED.examples_first(t.movedim(1, 0), examples, batch_first=batch_first)
            case _:
                raise AssertionError(f"where the examples are is not told by a layout: {self.value}")


_USUAL = (Layout.MERGED, Layout.SECOND_MERGED)
"""How merged axes lie as a rule, on axis 0 and on axis 1."""
Lies = Layout | Turned
"""How examples lie; where axis 0 is batch and positions in another order, the order (and not `Layout.TURNED`)."""


class Site(NamedTuple):
    """One tensor argument of one operation on one parameter."""

    operation: Any
    roots: tuple[str, ...]
    argument: int
    axes: int

    def __str__(self) -> str:
        name = getattr(self.operation, "__name__", str(self.operation))
        return f"argument {self.argument} of {name} with parameter {', '.join(self.roots)}"


Trace = list[tuple[Site, tuple[int, ...], Lies]]
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
    if grew == [1]:
        if (first[1], second[1]) == (small, large):
            return Layout.SECOND
        if first[1] % small == 0 and first[1] // small * large == second[1]:
            return Layout.SECOND_MERGED
    if [n for axis, n in enumerate(first) if axis in grew] == [small, small]:
        raise UnsupportedModelError(
            f"cannot tell which rows belong to which example in {site}: it holds every pair of examples inside the "
            f"batch, of shape {tuple(first)} for {small} examples and {tuple(second)} for {large}. In a contrastive or "
            "pairwise loss each example is in the losses of all others, and no clipping bounds what one of them can "
            "do. Expected values of one example each. Make each pair of inputs one example of the dataset, with a loss "
            "of its own, such as whether they belong together."
        )
    raise UnsupportedModelError(
        f"cannot tell which rows belong to which example in {site}: its shape is {tuple(first)} for {small} examples "
        f"and {tuple(second)} for {large}{_packed(site)}. Expected one axis that grows with the "
        "batch: axis 0 or axis 1 (alone, or merged with positions). Keep the batch on axis 0 there."
    )


class DoubtError(UnsupportedModelError):
    """It is not certain which rows of a batch belong to which example.

    Whoever began the forward looks at this batch anew, and runs the forward again. Where nobody does, it is a refusal.
    """

    def __init__(self, found: str, way_on: str, *, place: str | None = None) -> None:
        super().__init__(
            f"it is not certain which rows belong to which example: {found}. Expected rows whose example is known. "
            f"{way_on}"
        )
        self.place = place
        """Where in the code rows were moved along the batch, or None if that is not the reason."""


class Told:
    """The layouts that one forward meets, as they were learned of this very batch."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Site, tuple[int, ...]], list[Lies]] = {}
        self._met: dict[tuple[Site, tuple[int, ...]], int] = {}

    def add(self, site: Site, shape: tuple[int, ...], layout: Lies) -> None:
        """Adds what is met next."""
        self._layouts.setdefault((site, shape), []).append(layout)

    def begin(self) -> None:
        """Begins a forward, which meets everything in the order in which it was added."""
        self._met.clear()

    def next(self, site: Site, t: Tensor) -> Lies | None:
        """Returns the layout of `t`, which is met now in a forward, or None if nothing like it was added."""
        key = (site, tuple(t.shape))
        layouts = self._layouts.get(key, ())
        met = self._met[key] = self._met.get(key, 0) + 1
        return layouts[met - 1] if met <= len(layouts) else None

    def all(self, site: Site, t: Tensor) -> set[Lies]:
        """Returns all layouts of tensors of the shape of `t` at the site, where no order is known."""
        return set(self._layouts.get((site, tuple(t.shape)), ()))


def _packed(site: Site) -> str:
    """Returns what to do if a recurrent layer met a packed sequence of which nobody saw how it was packed."""
    if getattr(site.operation, "__name__", "") not in {"lstm", "gru", "rnn_tanh", "rnn_relu"}:
        return ""
    return (
        ", as of a packed sequence that came packed into the model, or whose rows were moved since. Give the model "
        "padded sequences and a tensor of their lengths, and pack in the forward (pack_padded_sequence)"
    )


@dataclass
class Layouts:
    """What has been learned of every site."""

    known: dict[Site, set[Lies]] = field(default_factory=dict)
    alone: set[Site] = field(default_factory=set)
    """Where rows were taken to lie example by example in batches of one example, in which every order is that one."""

    @property
    def learned(self) -> int:
        """Returns how many facts are known."""
        return sum(len(layouts) for layouts in self.known.values())

    def copy(self) -> Layouts:
        """Returns the same knowledge, which what is learned later does not change."""
        return Layouts({site: set(layouts) for site, layouts in self.known.items()}, set(self.alone))

    def restore(self, earlier: Layouts) -> None:
        """Forgets what was learned since a copy was taken."""
        again = earlier.copy()
        self.known, self.alone = again.known, again.alone

    def turn(self, site: Site, order: Turned) -> None:
        """Takes note of the order of the rows at a site, as it was found out."""
        known = self.known.setdefault(site, set())
        if site in self.alone:
            known.discard(_USUAL[order.axis])
        known.add(order)

    def of(self, site: Site, t: Tensor, examples: int) -> Lies:
        """Returns the layout of `t` at `site`, in a batch of `examples`.

        Args:
            site: where it is met.
            t: the tensor.
            examples: B.

        Raises:
            DoubtError: if the site was never looked at, or its known layouts do not decide.
        """
        if not examples and t.dim() and not t.shape[0]:
            return Layout.ROWS  # none of them is anybody's
        known = self.known.get(site, ())
        fits = _fitting(known, t, examples)
        if Layout.ROUTED in known and fits == [Layout.CONSTANT]:
            fits = []  # it may be rows that nobody followed
        if len(fits) == 1:
            return fits[0]
        if not known:
            why = "and it was not met when a batch was last looked at"
        else:
            seen = ", ".join(sorted(layout.value for layout in known))
            why = f"where it was seen as: {seen}. That {'leaves it open' if fits else 'does not fit'}"
        raise DoubtError(
            f"{site} has shape {tuple(t.shape)} in a batch of {examples}, {why}",
            "Keep the batch on axis 0 there, and one layout for each operation, or say whose the rows are "
            "(privet.rows_of).",
        )

    def saw_owners(self, site: Site) -> None:
        """Takes note of a site at which rows have owners of their own: others are not taken for a constant there."""
        self.known.setdefault(site, set()).add(Layout.ROUTED)

    def guessed(self, site: Site, t: Tensor, examples: int, told: Told | None) -> Lies:
        """Returns the likely layout of `t` while layouts are learned: a wrong guess is found out and mended.

        Args:
            site: where it is met.
            t: the tensor.
            examples: B.
            told: what the attempt before has learned of a batch of this size.
        """
        layout = None if told is None else told.next(site, t)
        if layout is not None:
            return layout
        fits = _fitting(self.known.get(site, ()), t, examples)
        turned = [each for each in fits if isinstance(each, Turned)]
        if len(fits) == 1 or turned:
            return (turned or fits)[0]
        if t.dim() and t.shape[0] == examples:
            return Layout.ROWS
        if t.dim() == 0 or (not t.requires_grad and t.shape[0] % examples):
            return Layout.CONSTANT
        if t.dim() > 1 and t.shape[1] == examples:
            return Layout.SECOND
        return Layout.CONSTANT if t.shape[0] % examples else Layout.MERGED

    def learn(self, first: Trace, second: Trace, small: int, large: int) -> tuple[bool, Told, Told]:
        """Learns from two traces of the same model with `small` and `large` examples.

        Returns whether both traces had decided everything as it turned out: if not, trace again, because a wrong
        decision changes what is met after it. And what was learned of either batch.
        """
        settled, told, other_told = True, Told(), Told()
        for (site, shape, decided), (other, other_shape, other_decided) in zip(first, second, strict=False):
            if site != other or len(shape) != len(other_shape):
                return False, told, other_told
            layout: Lies = _compared(site, shape, other_shape, small, large)
            if layout in _USUAL:
                if isinstance(decided, Turned) and decided == other_decided and decided.axis == layout.axis:
                    layout = decided
                if small > 1:
                    self.alone.discard(site)
                elif layout not in self.known.get(site, ()):
                    self.alone.add(site)
            self.known.setdefault(site, set()).add(layout)
            told.add(site, shape, layout)
            other_told.add(site, other_shape, layout)
            settled = settled and decided == layout == other_decided
        return settled and len(first) == len(second), told, other_told


def _fitting(known: Iterable[Lies], t: Tensor, examples: int) -> list[Lies]:
    """Returns those of the known layouts that `t` may have, without those that say the same of it."""
    fits: list[Lies] = []
    turned = []
    for layout in known:
        if isinstance(layout, Turned):
            turned.append(layout)
        elif _fits(layout, t, examples):
            fits.append(layout)
    for axis, usual in enumerate(_USUAL):
        here = [order for order in turned if order.axis == axis]
        order = same_order(here, t.shape[axis], examples) if here and t.dim() > axis else None
        if order is not None and not (examples == 1 and usual in fits):
            fits.append(order)
    for alone, merged in ((Layout.ROWS, Layout.MERGED), (Layout.SECOND, Layout.SECOND_MERGED)):
        if alone in fits and merged in fits:
            fits.remove(merged)  # with one position it is the same
    if len(fits) == 2 and examples == 1 and Layout.CONSTANT in fits:
        fits.remove(Layout.CONSTANT)  # one example owns all rows
    return fits


def _fits(layout: Layout, t: Tensor, examples: int) -> bool:
    match layout:
        case Layout.CONSTANT:
            return True
        case Layout.ROWS:
            return t.dim() > 0 and t.shape[0] == examples
        case Layout.MERGED:
            return t.dim() > 0 and t.shape[0] % max(examples, 1) == 0
        case Layout.SECOND:
            return t.dim() > 1 and t.shape[1] == examples
        case Layout.SECOND_MERGED:
            return t.dim() > 1 and t.shape[1] % max(examples, 1) == 0
        case _:
            return False  # said of the tensor itself, and not of its shape
