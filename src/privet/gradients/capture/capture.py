"""The only interception: every operation in which a parameter of the private model takes part, seen as it happens.

While a private forward or its backward runs, the parameters are watched (`watched.py`). It works for modules and for
functional calls alike, in whatever thread runs them, so that the recomputation of checkpointed activations is seen too.
An operation then falls into one of three cases:

* parameters and constants only: the result is a derived parameter (`derived.py`);
* data and parameters, an operation with a rule: it runs inside one autograd Function that gives the data their
  gradient and the parameters none, and records a `Use` when the gradient comes back;
* anything else: the same, with the vmap fallback as its rule.

    capture.begin(examples, sink)       # a new cycle: the parameters are watched
    losses = model(inputs)              # operations are captured
    capture.end([losses])
    losses.sum().backward()             # sink.put(...) for every use, sink.done() at the end; then nothing is watched
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from privet.errors import UnsupportedModelError
from privet.gradients.capture.call import CapturedCall, CapturedOperation, tensors_among
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.routing import owners_for, routed_now
from privet.gradients.capture.watched import Roots
from privet.gradients.layout import Layout, Layouts, Site, Trace
from privet.gradients.rules.free import EXPANSIONS, expansion
from privet.gradients.rules.functional import fallback
from privet.gradients.rules.registry import apart_handler_of, handler_of, structural_handler_of
from privet.gradients.use import Operation, UseSink

__all__ = ["Capture"]

_TENSOR_GETTERS = frozenset({"T", "mT", "H", "mH", "real", "imag"})


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - there is no public way to ask


class Capture:
    """Watches a module's parameters during a forward and its backward, and hands their uses to a sink.

    Args:
        parameters: the trainable parameters by canonical name.
        batch_first: whether axes merged with the batch have the batch outside.
        mapped: whether vmap takes the place of every rule of an operation on parameters.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, batch_first: bool = True, mapped: bool = False
    ) -> None:
        self.roots = Roots(parameters, self)
        self.layouts = Layouts()
        self.batch_first = batch_first
        self.handler_of = structural_handler_of if mapped else handler_of
        self._channels_last = False
        self._cycle: Cycle | None = None

    # -- when it watches ---------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters by canonical name."""
        return self.roots.parameters

    @property
    def cycle(self) -> Cycle | None:
        """Returns the forwards whose backward is still to come, or None."""
        return self._cycle

    @property
    def watching(self) -> bool:
        """Returns whether operations are looked at: inside a private forward, or a backward that may recompute it."""
        cycle = self._cycle
        return cycle is not None and (cycle.running > 0 or _in_backward())

    @property
    def channels_last(self) -> bool:
        """Returns whether 2-D convolutions see their kernels with the channels innermost."""
        return self._channels_last

    def prefer_channels_last(self, preferred: bool) -> None:  # noqa: FBT001 - it says what it sets
        """Decides how 2-D convolutions see their kernels from now on. It changes speed, and no result."""
        self._channels_last = preferred

    def begin(
        self, examples: int, sink: UseSink, *, made_up: bool = False, last: bool = True, trace: Trace | None = None
    ) -> None:
        """Drops whatever came before, and begins a forward of `examples` examples.

        Args:
            examples: B.
            sink: takes the uses that the backward brings.
            made_up: whether the examples stand in for none, and have no part in the sum.
            last: whether the next backward is the last one. If it is not, call `turn_to` before the last.
            trace: gets where the examples were found, while layouts are learned.
        """
        self.release()
        # In this order: a forward that is interrupted here leaves a cycle that is running, and so is dropped next time.
        self._cycle = Cycle(examples, sink, made_up, last, trace)
        self.roots.watch()

    def resume(self) -> None:
        """Begins another forward of the same examples, which shares the backward of the forwards before."""
        assert self._cycle is not None
        self._cycle.running += 1
        self.roots.watch()

    def end(self, outputs: Iterable[Tensor] = ()) -> None:
        """Ends the forward. The parameters stay watched until the backward, which may recompute parts of it."""
        cycle = self._cycle
        if cycle is None:  # something inside of the forward gave it up
            return
        cycle.running = max(cycle.running - 1, 0)

        def reached(gradient: Tensor) -> None:
            self._expect(cycle)

        for output in outputs:
            if output.requires_grad:  # so that the end of a backward without any use is heard of, too
                output.register_hook(reached)  # type: ignore[no-untyped-call]

    def turn_to(self, sink: UseSink, *, last: bool) -> None:
        """Hands the uses of the next backward of the same forwards to another sink."""
        assert self._cycle is not None
        self._cycle.sink, self._cycle.last = sink, last

    def release(self) -> None:
        """Drops the cycle and what it recorded, and stops watching: the parameters are ordinary ones again."""
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            cycle.close()
        self.roots.unwatch()

    # -- one operation -----------------------------------------------------------------------------------------------

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records an operation in which watched tensors take part, and returns its result."""
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _TENSOR_GETTERS:  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        cycle = self._cycle
        assert cycle is not None
        if cycle.opaque:
            args, kwargs = tree_map(partial(_hidden, cycle.opaque), (args, kwargs))
        tensors = list(tensors_among(itertools.chain(args, kwargs.values())))
        is_root = self.roots.is_root
        rooted = [is_root(t) for t in tensors]
        roots = [t for t, found in zip(tensors, rooted, strict=True) if found]
        if not roots:
            return func(*args, **kwargs)
        call = _Call(self, cycle)
        if (rearrange := apart_handler_of(func)) is not None:
            result = rearrange(call, func, args, kwargs)
            if result is not NotImplemented:
                return result
        labels = tuple(map(self.roots.label, roots))
        for index, t in enumerate(tensors):
            if not rooted[index] and t.dim():
                call.layouts[id(t)] = call.layout_at(Site(func, labels, index, t.dim()), t)
        if func in EXPANSIONS:
            result = expansion(call, func, args, kwargs)
            if result is not NotImplemented:
                return result
        if any(layout is not Layout.CONSTANT for layout in call.layouts.values()):
            handler = self.handler_of(func)
            result = NotImplemented if handler is None else handler(call, func, args, kwargs)
            return fallback(call, func, args, kwargs) if result is NotImplemented else result
        return self.roots.derive(func, args, kwargs, roots)

    # -- modules taken as one operation ------------------------------------------------------------------------------

    def enter_module(self, module: nn.Module) -> Cycle | None:
        """Hides a module's parameters while it runs, if it is watched. Returns the cycle to `show_module` again."""
        if not (self.watching and torch.is_grad_enabled()):
            return None
        cycle = self._cycle
        assert cycle is not None
        cycle.opaque.append(frozenset(id(p) for p in module.parameters()))
        return cycle

    @staticmethod
    def show_module(cycle: Cycle) -> None:
        """Shows the parameters again that `enter_module` hid."""
        cycle.opaque.pop()

    def leave_module(
        self,
        cycle: Cycle,
        module: nn.Module,
        operation: Operation,
        data: Sequence[Tensor],
        roots: Mapping[str, nn.Parameter],
    ) -> Any:
        """Shows the parameters again, and returns the output of the module as that of one operation."""
        self.show_module(cycle)
        if any(id(p) in opaque for opaque in cycle.opaque for p in roots.values()):
            return data[-1]  # a part of a module that is itself one operation
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            call = _Call(self, cycle)
            labels = tuple(self.roots.name(p) for p in roots.values())
            sites = (Site(type(module), labels, index, t.dim()) for index, t in enumerate(data))
            layouts = {call.layout_at(site, t) for site, t in zip(sites, data, strict=True)}
            if layouts != {Layout.ROWS}:
                raise UnsupportedModelError(
                    f"{type(module).__name__} with a registered rule met tensors in which "
                    f"{'; '.join(sorted(layout.value for layout in layouts))}. Expected the batch on axis 0 of each."
                )
            return call.apply(operation, data, roots, layout=Layout.ROWS)

    # -- the backward ------------------------------------------------------------------------------------------------

    def record(
        self, call: CapturedCall, data: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Hands the uses of one operation to the sink, when the gradient of its output has come."""
        sink = self._expect(call.cycle)
        for target, use in call.uses(data, values, gradients):
            sink.put(target, use)

    def _expect(self, cycle: Cycle) -> UseSink:
        """Asks autograd to call back at the end of this backward, once, and returns the sink of its uses."""
        sink = cycle.require_backward()
        if not cycle.queued:
            cycle.queued = True
            engine = torch.autograd.Variable._execution_engine  # noqa: SLF001 - as torch's own DDP does
            engine.queue_callback(partial(self._finish, cycle))
        return sink

    def _finish(self, cycle: Cycle) -> None:
        sink = cycle.sink
        if sink is None:  # given up since, by a hook of the user's: nothing is handed over
            return
        if cycle.last:
            # Before the sink hears of it, so that an error there leaves nothing behind. The cycle stays queued: if this
            # is interrupted, the next forward must not share the cycle, which holds the uses of this one.
            self.release()
        else:
            cycle.queued = False
        with torch.no_grad():
            sink.done()


class _Call:
    """One intercepted operation, as its handler sees it (`registry.Call`).

    Each interception has its own: handlers run in several threads, and call operations that are intercepted in turn.
    """

    __slots__ = ("_capture", "_cycle", "is_root", "layouts")

    def __init__(self, capture: Capture, cycle: Cycle) -> None:
        self._capture = capture
        self._cycle = cycle
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
            return Layout.ROUTED
        return self._capture.layouts.of(site, t, self._cycle.examples, trace=self._cycle.trace)

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
            routed = owners_for(operation, list(map(self.label, watched.values())), cycle.examples)
        # While layouts are learned, a wrong guess may say so. It is found out and mended.
        if layout is Layout.SECOND and not operation.positionwise and cycle.trace is None:
            raise UnsupportedModelError(
                f"{type(operation).__name__} of {', '.join(map(self.label, watched.values()))} met a batch on axis 1. "
                "Expected axis 0 there. Move the batch to axis 0."
            )
        call = CapturedCall(
            capture,
            cycle,
            operation,
            layout,
            routed,
            capture.batch_first,
            roles=tuple(values),
            targets={role: known.target(root) for role, root in watched.items()},
            data_count=len(data),
        )
        plain = [self._plain(value) if role in watched else value for role, value in values.items()]
        edge = known.parameters[known.sources(next(iter(watched.values())))[0]]
        return CapturedOperation.apply(call, *data, *plain, edge)  # type: ignore[no-untyped-call]

    def _plain(self, root: Tensor) -> Tensor:
        """Returns a root as a tensor that needs no gradient."""
        plain = root.detach()
        if self._capture.channels_last and plain.dim() == 4:
            return plain.to(memory_format=torch.channels_last)
        return plain


def _hidden(hidden: Sequence[frozenset[int]], value: Any) -> Any:
    """Returns a parameter of a module that is one operation without its gradient, and anything else as it is."""
    return value.detach() if any(id(value) in opaque for opaque in hidden) else value
