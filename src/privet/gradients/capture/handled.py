"""One intercepted operation as its handler sees it, and where the examples are in each of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from privet.errors import UnsupportedModelError
from privet.gradients.capture.call import CapturedCall, CapturedOperation, Recorder
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.moved import MovedRows
from privet.gradients.capture.packing import RECURRENT
from privet.gradients.capture.packing import require_alike as require_first_states_alike
from privet.gradients.capture.routing import Routed, require_alike, routed_now
from privet.gradients.capture.rows_seen import RowsSeen
from privet.gradients.capture.watched import Roots
from privet.gradients.layout import DoubtError, Layout, Layouts, Lies, Site
from privet.gradients.turned import Turned
from privet.gradients.use import Operation

__all__ = ["AddsUp", "Capturing", "HandledCall", "in_backward"]


def in_backward() -> bool:
    """Returns whether a backward runs in this thread, and what happens now is computed again."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - there is no public way to ask


class AddsUp(Protocol):
    """Says whether rows are spread over processes (implemented by `OnParts`)."""

    @property
    def add_up(self) -> Callable[[Tensor], Tensor] | None:
        """Returns what adds rows up over processes, or None if each is whole here."""


class Capturing(Recorder, Protocol):
    """What watches the forward (implemented by `Capture`)."""

    roots: Roots
    layouts: Layouts
    moved: MovedRows
    batch_first: bool

    @property
    def on_parts(self) -> AddsUp:
        """Returns what records operations on parameters in parts."""

    @property
    def channels_last(self) -> bool:
        """Returns whether 2-D convolutions see their kernels with the channels innermost."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records one operation, and returns its result."""


class HandledCall:
    """One intercepted operation, as its handler sees it (`registry.Call`).

    Each interception has its own: handlers run in several threads, and call operations that are intercepted in turn.
    """

    __slots__ = ("_capture", "_cycle", "_order", "_routed", "_traced", "is_root", "layouts")

    def __init__(self, capture: Capturing, cycle: Cycle) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001 - there is no public way to ask
            raise UnsupportedModelError(
                "a parameter is used inside of a transform of torch.func (vmap, grad, jvp, jacrev), which hides the "
                "examples. Expected the model to be called on the batch itself. Take gradients in a loss with "
                "torch.autograd.grad(y, x, create_graph=True), y having been summed over the batch."
            )
        self._capture = capture
        self._cycle = cycle
        self._routed: Routed | None = None  # the owners of the rows that it met
        self._order: Turned | None = None  # in which they lie, where it is not example by example
        self._traced: list[int] = []  # the places of its arguments in a trace
        self.layouts: dict[int, Layout] = {}  # of the operation's tensor arguments, by their ids
        self.is_root = capture.roots.is_root

    def label(self, root: Tensor) -> str:
        """Returns a parameter's name, or a derived tensor's label, for messages."""
        return self._capture.roots.label(root)

    def layout(self, t: Tensor) -> Layout:
        """Returns how the examples lie in `t`, a tensor argument of the operation being handled."""
        return self.layouts.get(id(t), Layout.CONSTANT)

    def layout_of_result(self, func: Callable[..., Any], root: Tensor, result: Tensor) -> Layout:
        """Returns how the examples lie in a result made from `root` alone, as by `expand`."""
        return self.layout_at(Site(func, (self.label(root),), 0, result.dim()), result)

    def layout_at(self, site: Site, t: Tensor) -> Layout:
        """Returns how the examples lie in `t` at a site."""
        routed = routed_now()
        if routed is not None:
            routed.require_rows(site, t)
        else:
            routed = self._owners(site, t)
        if routed is not None:
            if self._routed is not None and not self._routed.same(routed):
                raise UnsupportedModelError(
                    f"{site} has shape {tuple(t.shape)}, and its rows belong to other examples than those of another "
                    "argument. Expected rows of the same examples in all arguments of an operation on parameters."
                )
            self._routed = routed
            return Layout.ROUTED
        cycle, layouts = self._cycle, self._capture.layouts
        if cycle.trace is not None:
            told = cycle.told[-1] if cycle.telling else None
            layout = layouts.guessed(site, t, cycle.examples, told)
            self._traced.append(len(cycle.trace))
            cycle.trace.append((site, tuple(t.shape), layout))
        else:
            layout = self._told(site, t) if cycle.told else layouts.of(site, t, cycle.examples)
        return self._ordered(site, layout) if isinstance(layout, Turned) else layout

    def _ordered(self, site: Site, order: Turned) -> Layout:
        """Takes note of the order of one argument's rows, and raises unless it is that of all arguments."""
        if self._order not in (None, order) and self._cycle.trace is None:
            raise DoubtError(
                f"{site} met rows in another order than another argument has: {order.value}",
                "Give an operation rows in one order.",
            )
        self._order = order
        return Layout.SECOND_TURNED if order.axis else Layout.TURNED

    def _owners(self, site: Site, t: Tensor) -> Routed | None:
        """Returns the owners of the rows of `t` where they are known one by one, also in a part computed again."""
        cycle = self._cycle
        if not in_backward():
            routed = self._capture.moved.owned.of(t)
            if routed is not None and routed.axis:
                if site.argument and getattr(site.operation, "__name__", "") in RECURRENT:
                    return None  # a recurrent layer asks for the order of its first states by itself
                raise DoubtError(
                    f"{site} has shape {tuple(t.shape)}, and its rows were moved along the batch on axis {routed.axis}",
                    "Put them back in the order of the batch, or on axis 0.",
                )
            if routed is not None:
                cycle.owned.setdefault((site, tuple(t.shape)), []).append(routed)
                if cycle.trace is None:  # else it may follow from a wrong guess
                    self._capture.layouts.saw_owners(site)
            return routed
        met = cycle.owned.get((site, tuple(t.shape)), ())
        if met and not all(map(met[0].same, met[1:])):
            raise UnsupportedModelError(
                f"{site} met rows of different examples several times in one forward, and is computed again in the "
                "backward, so that nobody knows which of them these are. Expected one such use in a checkpointed part. "
                "Leave this part out of activation checkpointing."
            )
        return met[0] if met else None

    def _told(self, site: Site, t: Tensor) -> Lies:
        """Returns the layout of `t` in a cycle of which a forward was told the layouts of its batch."""
        cycle, layouts = self._cycle, self._capture.layouts
        if cycle.telling and not in_backward():
            layout = cycle.told[-1].next(site, t)
            if layout is None:
                raise DoubtError(
                    f"{site} has shape {tuple(t.shape)} in a batch of {cycle.examples}, and was not met when this very "
                    "batch was looked at",
                    "Let the model do the same on the same batch with the same random numbers.",
                )
            return layout
        if in_backward():
            found = set().union(*(told.all(site, t) for told in cycle.told))
            if len(found) == 1:
                return found.pop()
        return layouts.of(site, t, cycle.examples)

    def require_alike(self, name: str, data: Tensor, sizes: Tensor | None, firsts: Sequence[Tensor]) -> None:
        """Raises unless it is known whose the rows of a recurrent layer's data are, and its first states lie alike."""
        of, examples = self._capture.moved.owned.of, self._cycle.examples
        require_first_states_alike(name, data, sizes, firsts, of=of, examples=examples, again=in_backward())

    def lies_as(self, t: Tensor, like: Tensor) -> Tensor:
        """Returns `t`, whose rows have the owners of the rows of `like`, if these have owners of their own."""
        routed = self._capture.moved.owned.of(like)
        if routed is not None:
            self._capture.moved.owned.put(t, routed)
        return t

    def by_example(self, rows: Tensor) -> Tensor | None:
        """Returns rows of known owners by example (B, L, ...), filled up with zeros, or None of other tensors."""
        if routed_now() is not None or self._routed is None or self.layout(rows) is not Layout.ROUTED:
            return None
        return self._routed.examples_first(rows, self._cycle.examples)

    def as_rows(self, t: Tensor, like: Tensor) -> Tensor:
        """Returns what is by example (B, L, ...) in the order of the rows of `like`, with their owners."""
        assert self._routed is not None
        return self.lies_as(self._routed.rows_first(t), like)

    def again(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `func(...)` with capture looking at it, for handlers that take an operation apart."""
        return self._capture.intercept(func, args, kwargs)

    def apply(
        self,
        operation: Operation,
        data: Sequence[Tensor],
        roots: Mapping[str, Tensor | None],
        *,
        layout: Layout | None = None,
    ) -> Any:
        """Runs the operation, and returns its output; its uses are recorded when the gradient comes back.

        Args:
            operation: what is to run, made for this call.
            data: what varies with the examples.
            roots: the parameters by role; frozen and absent ones may be among them.
            layout: how the examples lie in data and output, if not as in the first of the data.
        """
        capture, cycle, known = self._capture, self._cycle, self._capture.roots
        layout = self.layout(data[0]) if layout is None else layout
        values = {role: root for role, root in roots.items() if root is not None}
        watched = {role: root for role, root in values.items() if self.is_root(root)}
        routed = None
        if layout is Layout.ROUTED:
            routed = self._routed
            assert routed is not None
            self._require_rows(data)
            require_alike(operation, list(map(self.label, watched.values())), routed, cycle.examples)
        # While layouts are learned, a wrong guess may say so. It is found out and mended.
        if layout.axis and not operation.positionwise and cycle.trace is None:
            raise UnsupportedModelError(
                f"{type(operation).__name__} of {', '.join(map(self.label, watched.values()))} met a batch on axis 1. "
                "Expected axis 0 there. Move the batch to axis 0."
            )
        order = self._order if layout in (Layout.TURNED, Layout.SECOND_TURNED) else None
        edge = known.parameters[known.sources(next(iter(watched.values())))[0]]
        call = CapturedCall(
            capture,
            cycle,
            operation,
            layout,
            routed,
            capture.batch_first,
            order,
            roles=tuple(values),
            targets={role: known.target(root) for role, root in watched.items()},
            data_count=len(data),
            edge=edge,
            lasting=not known.transient,
            add_up=capture.on_parts.add_up,
        )
        plain = [self._plain(value) if role in watched else value for role, value in values.items()]
        result = CapturedOperation.apply(call, *data, *plain, edge)
        if self._traced and isinstance(cycle.trace, RowsSeen):
            cycle.trace.watch(result, self._traced)
        return result

    def _require_rows(self, data: Sequence[Tensor]) -> None:
        """Raises if rows with owners meet data of another kind in one operation."""
        others = {self.layouts.get(id(t), Layout.ROUTED) for t in data} - {Layout.ROUTED}
        if others:
            raise DoubtError(
                f"an operation met rows that were moved along the batch, and data in which {others.pop().value}",
                "Give an operation rows that were moved alike.",
            )

    def _plain(self, root: Tensor) -> Tensor:
        """Returns a root as a tensor that needs no gradient."""
        plain = root.detach()
        if self._capture.channels_last and plain.dim() == 4:
            return plain.to(memory_format=torch.channels_last)
        return plain
