"""The only interception: every operation in which a parameter of the private model takes part, seen as it happens.

While a private forward or its backward runs, the parameters are watched (`watched.py`). It works for modules and for
functional calls alike, in whatever thread runs them, so that the recomputation of checkpointed activations is seen too.
An operation then falls into one of three cases:

* parameters and constants only: the result is a derived parameter (`derived.py`);
* data and parameters, an operation with a rule: it runs inside one autograd Function that gives the data their
  gradient and the parameters none, and records a `Use` when the gradient comes back;
* anything else: the same, with the vmap fallback as its rule.

Where it is not certain which rows belong to which example, nothing is captured any more, and the end of the forward
raises `DoubtError`: the batch has to be looked at, and the forward run anew.

    capture.begin(examples, sink)       # a new cycle: the parameters are watched
    losses = model(inputs)              # operations are captured
    capture.end([losses])
    losses.sum().backward()             # sink.put(...) for every use, sink.done() at the end; then nothing is watched
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from privet.batches.tree import rows_told_in
from privet.errors import UnsupportedModelError
from privet.gradients.capture.call import CapturedCall, tensors_among
from privet.gradients.capture.checkpoints import not_reentrant
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.handled import HandledCall, in_backward
from privet.gradients.capture.known_moves import KnownMoves, MovesMet
from privet.gradients.capture.moved import MovedRows, codes_of
from privet.gradients.capture.on_parts import OnParts
from privet.gradients.capture.watched import Roots, asks_only
from privet.gradients.layout import DoubtError, Layout, Layouts, Site, Told, Trace
from privet.gradients.rules.free import EXPANSIONS, expansion
from privet.gradients.rules.functional import fallback
from privet.gradients.rules.registry import apart_handler_of, handler_of, structural_handler_of
from privet.gradients.spread import Parts
from privet.gradients.use import Operation, UseSink

__all__ = ["Capture"]


class Capture:
    """Watches a module's parameters during a forward and its backward, and hands their uses to a sink.

    Args:
        parameters: the trainable parameters by canonical name.
        batch_first: whether axes merged with the batch have the batch outside.
        mapped: whether vmap takes the place of every rule of an operation on parameters.
        within: the function that every forward begins with, such as the module's `forward`.
        parts: runs operations on parameters of which each process holds a part.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_first: bool = True,
        mapped: bool = False,
        within: Callable[..., Any] | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.roots = Roots(parameters, self)
        self.moved = MovedRows(
            self.roots.is_root, codes_of(within), in_parts=parts is not None, batch_first=batch_first
        )
        self.layouts = Layouts()
        self.batch_first = batch_first
        self.handler_of = structural_handler_of if mapped else handler_of
        self.on_parts = OnParts(self, parts)
        self._channels_last = False
        self._told: Told | None = None
        self._cycle: Cycle | None = None

    # -- when it watches ---------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns the trainable parameters by canonical name."""
        return self.roots.parameters

    def standing_for(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Returns the objects that operations meet as these parameters, once the forward has run."""
        return {name: self.roots.parameters[name] for name in names}

    @property
    def cycle(self) -> Cycle | None:
        """Returns the forwards whose backward is still to come, or None."""
        return self._cycle

    @property
    def watching(self) -> bool:
        """Returns whether operations are looked at: inside a private forward, or a backward that may recompute it."""
        cycle = self._cycle
        return cycle is not None and cycle.doubt is None and (cycle.running > 0 or in_backward())

    @property
    def channels_last(self) -> bool:
        """Returns whether 2-D convolutions see their kernels with the channels innermost."""
        return self._channels_last

    def prefer_channels_last(self, preferred: bool) -> None:  # noqa: FBT001 - it says what it sets
        """Decides how 2-D convolutions see their kernels from now on. It changes speed, and no result."""
        self._channels_last = preferred

    def begin(
        self,
        examples: int,
        sink: UseSink,
        *,
        made_up: bool = False,
        last: bool = True,
        trace: Trace | None = None,
        moves: MovesMet | None = None,
        inputs: Any = (),
    ) -> None:
        """Drops whatever came before, and begins a forward of `examples` examples.

        Args:
            examples: B.
            sink: takes the uses that the backward brings.
            made_up: whether the examples stand in for none, and have no part in the sum.
            last: whether the next backward is the last one. If it is not, call `turn_to` before the last.
            trace: gets where the examples were found, while layouts are learned.
            moves: gets what was moved, while layouts are learned.
            inputs: of the forward, which may say of some tensors whose their rows are.
        """
        self.release()
        # In this order: a forward that is interrupted here leaves a cycle that is running, and so is dropped next time.
        self._cycle = Cycle(examples, sink, made_up, last, trace, rows_told_in(inputs))
        self._start(self._cycle, moves)

    def meet(self, name: str, parameter: nn.Parameter) -> None:
        """Takes another object for a parameter from now on, and watches it if a forward is under way."""
        self.roots.meet(name, parameter)
        if self._cycle is not None:
            self.roots.watch()

    def resume(self, inputs: Any = None) -> None:
        """Begins another forward of the same examples, by default the last anew, which shares the same backward."""
        assert self._cycle is not None
        self._cycle.running += 1
        if inputs is not None:
            self._cycle.rows = rows_told_in(inputs)
        self._start(self._cycle)

    def _start(self, cycle: Cycle, moves: MovesMet | None = None) -> None:
        cycle.doubt, cycle.telling = None, self._told is not None
        if self._told is not None:
            self._told.begin()
            cycle.told.append(self._told)
        self.roots.watch()
        self.moved.start(cycle, moves, cycle.rows)

    @property
    def told(self) -> Told | None:
        """Returns what is told to the forwards that begin from now on."""
        return self._told

    def tell(self, told: Told | None) -> None:
        """Says what was learned of the very batch whose forwards begin from now on, or that nothing was."""
        self._told = told

    def knowledge(self) -> tuple[Layouts, KnownMoves]:
        """Returns what is known of the model now, which what is learned later does not change."""
        return self.layouts.copy(), self.moved.known.copy()

    def forget_since(self, knowledge: tuple[Layouts, KnownMoves]) -> None:
        """Forgets what was learned since then, of this model or of the batch at hand."""
        layouts, moves = knowledge
        self.layouts.restore(layouts)
        self.moved.known = moves.copy()
        self._told = None

    def set_aside(self) -> Cycle:
        """Drops the forward that has just ended in doubt, and returns its cycle with the forwards before it.

        The capture is free for a check until `take_up`.
        """
        cycle, self._cycle = self._cycle, None
        assert cycle is not None
        cycle.running, cycle.doubt = 0, None
        self._unwatch()
        return cycle

    def take_up(self, cycle: Cycle) -> None:
        """Goes on with a cycle that was set aside: begins the forward anew that was dropped."""
        self.release()
        self._cycle = cycle
        self.resume()

    def end(self, outputs: Iterable[Tensor] = ()) -> None:
        """Ends the forward. The parameters stay watched until the backward, which may recompute parts of it.

        Raises:
            DoubtError: if it was not certain which rows belong to which example. The forward counts for nothing.
        """
        cycle = self._cycle
        if cycle is None:  # something inside of the forward gave it up
            return
        self.moved.stop()
        if cycle.doubt is not None:
            raise cycle.doubt
        cycle.running, cycle.telling = max(cycle.running - 1, 0), False

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
        self._unwatch()

    def _unwatch(self) -> None:
        self.moved.stop()
        not_reentrant(self.moved, None)
        self.roots.unwatch()

    # -- one operation -----------------------------------------------------------------------------------------------

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records an operation in which watched tensors take part, and returns its result."""
        if asks_only(func):
            return func(*args, **kwargs)
        cycle = self._cycle
        assert cycle is not None
        try:
            if threading.get_ident() != self.moved.thread:
                self._require_followed(cycle)
            return self._captured(cycle, func, args, kwargs)
        except DoubtError as doubt:
            if in_backward():  # a part that is computed again: the forward cannot be run anew any more
                raise
            cycle.doubt = doubt
        except Exception:
            if cycle.doubt is None:  # else a part of the operation was in doubt, and came back as it is
                raise
        return func(*args, **kwargs)

    def _require_followed(self, cycle: Cycle) -> None:
        """Raises if rows may have been moved where nobody looked: in a thread that the forward began."""
        if cycle.telling or cycle.trace is not None or not cycle.examples or in_backward():
            return
        raise DoubtError(
            "a parameter is used in a thread that the forward began, in which rows of the batch may have been moved",
            "Run the model in one thread.",
            place="a thread of its own",
        )

    def _captured(self, cycle: Cycle, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cycle.opaque:
            args, kwargs = tree_map(partial(_hidden, cycle.opaque), (args, kwargs))
        tensors = list(tensors_among(itertools.chain(args, kwargs.values())))
        is_root = self.roots.is_root
        rooted = [is_root(t) for t in tensors]
        roots = [t for t, found in zip(tensors, rooted, strict=True) if found]
        if not roots:
            return func(*args, **kwargs)
        call = HandledCall(self, cycle)
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
        if cycle.trace is None:  # while layouts are learned, data may be taken for a constant by a wrong guess
            self._refuse_mixed(func, labels, [t for t, root in zip(tensors, rooted, strict=True) if not root])
        return self.roots.derive(func, args, kwargs, roots)

    def _refuse_mixed(self, func: Callable[..., Any], labels: Sequence[str], constants: Sequence[Tensor]) -> None:
        """Raises if a constant that a parameter meets needs a gradient: derived from both, it would lose its own."""
        for t in constants:
            if t.requires_grad:
                raise UnsupportedModelError(
                    f"{getattr(func, '__name__', func)} of {', '.join(labels)} met a tensor of shape {tuple(t.shape)} "
                    "that needs a gradient and has no batch axis: it mixes examples, as a mean over the batch does, or "
                    "comes from a parameter in a way that is not captured. Take statistics over each example, not over "
                    "the batch, and keep the batch axis; detach a tensor that does not depend on the data."
                )

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
            call = HandledCall(self, cycle)
            labels = tuple(self.roots.name(p) for p in roots.values())
            sites = (Site(type(module), labels, index, t.dim()) for index, t in enumerate(data))
            try:
                layouts = {call.layout_at(site, t) for site, t in zip(sites, data, strict=True)}
            except DoubtError as doubt:
                if in_backward():
                    raise
                cycle.doubt = doubt
                return data[-1]
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
        if self.roots.transient:
            call.operation.keep(dict(zip(call.roles, values, strict=True)))
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


def _hidden(hidden: Sequence[frozenset[int]], value: Any) -> Any:
    """Returns a parameter of a module that is one operation without its gradient, and anything else as it is."""
    return value.detach() if any(id(value) in opaque for opaque in hidden) else value
