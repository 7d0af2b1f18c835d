"""The only interception: every operation in which a parameter of the private model takes part, seen as it happens.

While a private forward or its backward runs, the parameters are instances of a subclass that answers for torch
functions (`__torch_function__`). It works for modules and for functional calls alike, in whatever thread runs them,
so that the recomputation of checkpointed activations is seen too. An operation then falls into one of three cases:

* parameters and constants only: the result is a derived parameter (`derived.py`);
* data and parameters, an operation with a rule: it runs inside one autograd Function that gives the data their
  gradient and the parameters none, and records a `Use` when the gradient comes back;
* anything else: the same, with the vmap fallback as its rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from privet.errors import ProtocolError, UnsupportedModelError
from privet.gradients.capture.call import CapturedCall, CapturedOperation, tensors_among
from privet.gradients.capture.routing import owners_for, routed_now
from privet.gradients.derived import Derivation, is_isometry
from privet.gradients.layout import Layout, Layouts, Site
from privet.gradients.rules.free import EXPANSIONS, expansion
from privet.gradients.rules.functional import fallback
from privet.gradients.rules.registry import apart_handler_of, handler_of, structural_handler_of
from privet.gradients.tracing import tracing
from privet.gradients.use import Operation, Recorded, Use

__all__ = ["Capture", "Recorded"]

_TENSOR_GETTERS = frozenset({"T", "mT", "H", "mH", "real", "imag"})


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - there is no public way to ask


class _Watched:
    """Answers for torch functions on behalf of a tensor. Each capture makes subclasses of its own that point to it."""

    capture: ClassVar[Capture]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            if cls.capture.watching and torch.is_grad_enabled():
                return cls.capture.intercept(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))


class _WatchedParameter(_Watched, nn.Parameter):
    """A parameter while it is watched. A copy of it is an ordinary parameter."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = copy = nn.Parameter(self.detach().clone(), self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _DerivedTensor(_Watched, Tensor):
    """A tensor computed from watched parameters alone."""

    derivation: Derivation


class Capture:
    """Watches a module's parameters during a forward and its backward, and gathers their uses.

    Args:
        parameters: the trainable parameters by canonical name.
        batch_first: whether axes merged with the batch have the batch outside.
        mapped: whether vmap takes the place of every rule of an operation on parameters.
        on_backward: called at the end of every backward that reached a watched parameter, with what was recorded.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        batch_first: bool = True,
        mapped: bool = False,
        on_backward: Callable[[Recorded], None],
    ) -> None:
        self.parameters = dict(parameters)
        self.batch_first = batch_first
        self._handler_of = structural_handler_of if mapped else handler_of
        self.layouts = Layouts()
        self.channels_last = False  # whether 2-D convolutions see their kernels with the channels innermost
        self.on_backward = on_backward
        self.on_use: Callable[[str | Derivation, Use], None] | None = None
        """Takes every use at once, and several backwards of one forward; then whoever set it has to `release`."""
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameter_class = type("WatchedParameter", (_WatchedParameter,), {"capture": self})
        self._derived_class = type("DerivedTensor", (_DerivedTensor,), {"capture": self})
        self._derivations = itertools.count()
        self._release()

    # -- when it watches ---------------------------------------------------------------------------------------------

    def _release(self) -> None:
        self._depth = 0
        self._examples: int | None = None
        self._made_up = False
        self._recorded = Recorded()
        self._cycle = object()  # the forwards that share the next backward
        self._queued = False
        self._met: dict[int, Layout] = {}
        self._opaque: list[frozenset[int]] = []  # the parameters of modules that are one operation, while they run

    @property
    def watching(self) -> bool:
        """Returns whether operations are looked at: inside a private forward, or a backward that may recompute it."""
        return self._depth > 0 or (self._examples is not None and _in_backward())

    @property
    def examples(self) -> int | None:
        """Returns the number of examples of the forwards whose backward is still to come, or None."""
        return self._examples

    def begin(self, examples: int, *, made_up: bool = False) -> None:
        """Begins a forward of `examples` examples. Several forwards may share a backward if they have as many each.

        `made_up` says that the examples stand in for none, and have no part in the sum.
        """
        if self._queued:  # a backward that broke off
            self.release()
        if self._examples is not None and (self._examples, self._made_up) != (examples, made_up):
            earlier = 0 if self._made_up else self._examples
            self.release()
            raise ProtocolError(
                f"a forward of {0 if made_up else examples} examples follows one of {earlier} that had no backward. "
                "Expected forwards that share a backward to be of the same examples. Run backward after each forward; "
                "use eval() or no_grad() for a forward that is not trained on."
            )
        self._examples, self._made_up = examples, made_up
        self._depth += 1
        for parameter in self.parameters.values():
            if parameter.requires_grad and type(parameter) is nn.Parameter:
                parameter.grad = None  # the last step's private gradient, which is done with
                parameter.__class__ = self._parameter_class

    def end(self, outputs: Iterable[Tensor] = ()) -> None:
        """Ends the forward. The parameters stay watched until the backward, which may recompute parts of it."""
        self._depth = max(self._depth - 1, 0)
        cycle = self._cycle
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda gradient: self._queue(cycle))  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Stops watching: the parameters are ordinary again, and what was recorded is forgotten."""
        for parameter in self.parameters.values():
            if isinstance(parameter, _WatchedParameter):
                parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        self._release()

    # -- one operation -----------------------------------------------------------------------------------------------

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of `func`, in which watched parameters take part."""
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _TENSOR_GETTERS:  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        if self._opaque:
            args, kwargs = tree_map(self._hidden, (args, kwargs))
        tensors = list(tensors_among(itertools.chain(args, kwargs.values())))
        rooted = [self.is_root(t) for t in tensors]
        roots = [t for t, is_root in zip(tensors, rooted, strict=True) if is_root]
        if not roots:
            return func(*args, **kwargs)
        if (rearrange := apart_handler_of(func)) is not None:
            result = rearrange(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        met, self._met = self._met, {}
        try:
            labels = tuple(self.label(root) for root in roots)
            for place, t in enumerate(tensors):
                if not rooted[place] and t.dim():
                    self._met[id(t)] = self._layout(Site(func, labels, place, t.dim()), t)
            if func in EXPANSIONS:
                result = expansion(self, func, args, kwargs)
                if result is not NotImplemented:
                    return result
            if any(layout is not Layout.CONSTANT for layout in self._met.values()):
                handler = self._handler_of(func)
                result = NotImplemented if handler is None else handler(self, func, args, kwargs)
                return fallback(self, func, args, kwargs) if result is NotImplemented else result
            return self._derive(func, args, kwargs, roots)
        finally:
            self._met = met

    def _hidden(self, value: Any) -> Any:
        """Returns a parameter of a module that is one operation without its gradient, and anything else as it is."""
        return value.detach() if any(id(value) in opaque for opaque in self._opaque) else value

    def again(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns `func(...)` with capture looking at it, for handlers that take an operation apart."""
        return self.intercept(func, args, kwargs)

    def is_root(self, value: object) -> bool:
        """Returns whether `value` is a watched parameter, or derived from watched parameters alone."""
        kind = type(value)  # not isinstance, which asks the classes of torch: this is the hottest line of a forward
        return kind is self._derived_class or (kind is self._parameter_class and id(value) in self._names)

    def label(self, root: Tensor) -> str:
        """Returns a parameter's name, or a derived tensor's label."""
        return root.derivation.label if isinstance(root, _DerivedTensor) else self._names[id(root)]

    def layout(self, t: Tensor) -> Layout:
        """Returns how the examples lie in `t`, a tensor argument of the operation being handled."""
        return self._met.get(id(t), Layout.CONSTANT)

    def layout_of_result(self, func: Callable[..., Any], root: Tensor, result: Tensor) -> Layout:
        """Returns how the examples lie in a result made from `root` alone, as by `expand`."""
        return self._layout(Site(func, (self.label(root),), 0, result.dim()), result)

    def _layout(self, site: Site, t: Tensor) -> Layout:
        assert self._examples is not None
        routed = routed_now()
        if routed is not None:
            routed.require_rows(site, t)
            return Layout.ROUTED
        return self.layouts.of(site, t, self._examples)

    def _derive(self, func: Callable[..., Any], args: Any, kwargs: Any, roots: Sequence[Tensor]) -> Any:
        result = func(*args, **kwargs)
        sources = tuple(dict.fromkeys(s for root in roots for s in self._sources(root)))
        label = f"{getattr(func, '__name__', func)}({', '.join(map(self.label, roots))})"
        isometric = len(roots) == 1 and is_isometry(func, args) and self._isometric(roots[0])
        call = next(self._derivations)
        pieces = result if isinstance(result, list | tuple) else (result,)

        def wrapped(t: Any, part: tuple[int, int] | None) -> Any:
            if not isinstance(t, Tensor) or not t.requires_grad:
                return t
            if isinstance(t, _DerivedTensor | _WatchedParameter):  # in place, or itself
                if isinstance(t, _DerivedTensor):
                    t.derivation = Derivation(label, t.as_subclass(Tensor), sources, isometric=False)
                return t
            derived: _DerivedTensor = self._watched(t)
            derived.derivation = Derivation(label, t, sources, isometric, part)
            return derived

        if pieces is not result:
            return wrapped(result, None)
        whole = isinstance(roots[0], _WatchedParameter)  # pieces of pieces are not told apart
        return type(result)(wrapped(t, (call, i) if whole else None) for i, t in enumerate(pieces))

    def _watched(self, t: Tensor) -> Any:
        """Returns a tensor like `t` that answers for torch functions."""
        if not tracing():
            return t.as_subclass(self._derived_class)
        alias = t.view_as(t)
        alias.__class__ = self._derived_class  # a graph knows a tensor as the object that it is
        return alias

    def _sources(self, root: Tensor) -> tuple[str, ...]:
        return root.derivation.sources if isinstance(root, _DerivedTensor) else (self._names[id(root)],)

    def _isometric(self, root: Tensor) -> bool:
        return root.derivation.isometric if isinstance(root, _DerivedTensor) else True

    # -- modules taken as one operation ------------------------------------------------------------------------------

    def enter_module(self, module: nn.Module) -> bool:
        """Hides a module's parameters while it runs; returns whether it is being watched at all."""
        looks = self.watching and torch.is_grad_enabled()
        if looks:
            self._opaque.append(frozenset(id(p) for p in module.parameters()))
        return looks

    def leave_module(
        self, module: nn.Module, operation: Operation, data: Sequence[Tensor], roots: Mapping[str, nn.Parameter]
    ) -> Any:
        """Returns the output of a module as one operation, its uses recorded when the gradient comes back."""
        self.show_module()
        if any(id(p) in opaque for opaque in self._opaque for p in roots.values()):
            return data[-1]  # a part of a module that is itself one operation
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            labels = tuple(self._names[id(p)] for p in roots.values())
            sites = (Site(type(module), labels, place, t.dim()) for place, t in enumerate(data))
            layouts = {self._layout(site, t) for site, t in zip(sites, data, strict=True)}
            if layouts != {Layout.ROWS}:
                raise UnsupportedModelError(
                    f"{type(module).__name__} with a registered rule met tensors in which "
                    f"{'; '.join(sorted(layout.value for layout in layouts))}. Expected the batch on axis 0 of each."
                )
            return self.apply(operation, data, roots, layout=Layout.ROWS)

    def show_module(self) -> None:
        """Shows the parameters again that `enter_module` hid."""
        self._opaque.pop()

    # -- uses --------------------------------------------------------------------------------------------------------

    def apply(
        self,
        operation: Operation,
        data: Sequence[Tensor],
        roots: Mapping[str, Tensor | None],
        *,
        layout: Layout | None = None,
    ) -> Any:
        """Returns the operation's output; its uses are recorded when the gradient comes back.

        Args:
            operation: what is to run.
            data: what varies with the examples.
            roots: the parameters by role; frozen and absent ones may be among them.
            layout: how the examples lie in data and output, if not as in the first of the data.
        """
        assert self._examples is not None
        layout = self.layout(data[0]) if layout is None else layout
        routed = owners_for(operation, self._described(roots), self._examples) if layout is Layout.ROUTED else None
        if layout is Layout.SECOND and not operation.positionwise and self.layouts.trace is None:
            raise UnsupportedModelError(
                f"{type(operation).__name__} of {', '.join(self._described(roots))} met a batch on axis 1. Expected "
                "axis 0 there. Move the batch to axis 0."
            )
        values = {role: root for role, root in roots.items() if root is not None}
        targets: dict[str, str | Derivation] = {}
        for role, root in values.items():
            if self.is_root(root):
                targets[role] = root.derivation if isinstance(root, _DerivedTensor) else self._names[id(root)]
        plain = [self._plain(value) for value in values.values()]
        edge = self.parameters[next(s for r in values.values() if self.is_root(r) for s in self._sources(r))]
        rest = self._examples, tuple(values), targets, len(data)
        call = CapturedCall(self, self._cycle, operation, layout, routed, *rest)
        return CapturedOperation.apply(call, *data, *plain, edge)  # type: ignore[no-untyped-call]

    def _plain(self, value: Tensor) -> Tensor:
        if not self.is_root(value):
            return value
        plain = value.detach()
        if self.channels_last and plain.dim() == 4:
            return plain.to(memory_format=torch.channels_last)
        return plain

    def _described(self, roots: Mapping[str, Tensor | None]) -> list[str]:
        return [self.label(root) for root in roots.values() if root is not None and self.is_root(root)]

    def record(
        self, call: CapturedCall, data: Sequence[Tensor], values: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Records the uses of one operation, when the gradient of its output has come."""
        self._queue(call.cycle)
        recorded = self._recorded
        recorded.examples = call.examples
        operation = call.operation

        def examples_first(t: Tensor) -> Tensor:
            if call.routed is not None:
                return call.routed.examples_first(t, call.examples)
            if not operation.positionwise:  # its rows stay rows: those of one example have to lie together
                if call.layout is Layout.MERGED and not self.batch_first:
                    return t.reshape(-1, call.examples, *t.shape[1:]).movedim(1, 0).flatten(0, 1)
                return t
            return call.layout.examples_first(t, call.examples, batch_first=self.batch_first)

        kept = [None if t is None else examples_first(t) for t in operation.saved(data)]
        gradient = examples_first(gradients[0].detach())
        kept.extend(examples_first(g.detach()) for g in gradients[1:])
        shapes = dict(zip(call.roles, (tuple(v.shape) for v in values), strict=True))
        for role, target in call.targets.items():
            use = Use(operation, role, tuple(kept), gradient, shapes[role])
            if self.on_use is not None:
                self.on_use(target, use)
            elif isinstance(target, str):
                recorded.direct.setdefault(target, []).append(use)
            else:
                recorded.derived.setdefault(target, []).append(use)

    def _queue(self, cycle: object) -> None:
        """Asks autograd to call back at the end of this backward, once. `cycle` is that of the forward."""
        if cycle is not self._cycle:
            raise ProtocolError(
                "backward ran again, or late, through a forward whose gradient was taken, or given up, before. "
                "Expected one backward for each forward: add the losses and call backward once, without retain_graph."
            )
        if not self._queued and self._examples is not None:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # noqa: SLF001 - as torch's own DDP does

    def _finish(self) -> None:
        if self.on_use is not None:
            self._queued = False
            return
        recorded = self._recorded
        self.release()
        with torch.no_grad():
            self.on_backward(recorded)
