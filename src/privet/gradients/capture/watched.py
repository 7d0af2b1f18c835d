"""Tensors that are watched: parameters of the private model, and what is derived from them alone.

A watched tensor is an instance of a subclass that answers for torch functions (`__torch_function__`). A parameter
becomes one for a while by a change of its class, and stays the same object: optimizers, `state_dict` and the user's own
references never notice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from privet.errors import ProtocolError
from privet.gradients.capture.fixed_lookups import fixed_lookup
from privet.gradients.capture.functions import look_at_functions
from privet.gradients.derived import Derivation
from privet.gradients.isometries import is_isometry
from privet.gradients.tracing import tracing

__all__ = ["Interceptor", "Roots", "asks_only"]

_LONGEST = 240
_TENSOR_GETTERS = frozenset({"T", "mT", "H", "mH", "real", "imag"})


class Interceptor(Protocol):
    """Takes the torch functions in which watched tensors take part (implemented by `Capture`)."""

    @property
    def watching(self) -> bool:
        """Returns whether operations are looked at now."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records one operation, and returns its result."""

    @property
    def on_parts(self) -> Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]:
        """Returns what records an operation on parameters of which this process holds a part, and gives its result."""


def asks_only(func: Callable[..., Any]) -> bool:
    """Returns whether a function of torch reads an attribute of a tensor that is no tensor with a gradient."""
    return getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ not in _TENSOR_GETTERS  # type: ignore[attr-defined]


class _Watched:
    """Answers for torch functions on behalf of a tensor. Each capture makes subclasses of its own that point to it."""

    interceptor: ClassVar[Interceptor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Handlers compute with the same tensors: what they call must not be intercepted again.
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            if cls.interceptor.watching and torch.is_grad_enabled():
                return cls._intercepted(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def _intercepted(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cls.interceptor.intercept(func, args, kwargs)


class _CopiedPlain:
    """A copy of a watched parameter is an ordinary one."""

    requires_grad: bool
    detach: Callable[[], Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        memo[id(self)] = copy = nn.Parameter(self.detach().clone(), self.requires_grad)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _WatchedParameter(_CopiedPlain, _Watched, nn.Parameter):
    """A parameter while it is watched."""


class _WatchedPart(_CopiedPlain, _Watched):
    """A parameter of which each process holds a part, while it is watched."""

    @classmethod
    def _intercepted(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return cls.interceptor.on_parts(func, args, kwargs)


class _DerivedTensor(_Watched, Tensor):
    """A tensor computed from watched parameters alone."""

    derivation: Derivation


class _Part(NamedTuple):
    """A parameter of which each process holds a part."""

    shown: nn.Parameter
    plain: type[nn.Parameter]  # its class while it is not watched
    watched: type[Any]


class Roots:
    """The roots of all uses: the parameters of one capture, and the tensors derived from them alone.

    Args:
        parameters: the trainable parameters by canonical name.
        interceptor: takes the operations on roots.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], interceptor: Interceptor) -> None:
        self.parameters = dict(parameters)
        self.transient = False  # whether the memory of some parameters is let go of when their backward is over
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameter_class = type("WatchedParameter", (_WatchedParameter,), {"interceptor": interceptor})
        self._derived_class = type("DerivedTensor", (_DerivedTensor,), {"interceptor": interceptor})
        self._interceptor = interceptor
        self._parts: dict[str, _Part] = {}
        self._part_names: dict[int, str] = {}
        self._calls = itertools.count()

    def watch(self) -> None:
        """Makes the parameters that train watched ones, and drops what is in their `grad`.

        That is the last step's private gradient, which the optimizer has taken.
        """
        if self._parts:
            self._follow_parts()
        if not (self._parts or self.transient):
            look_at_functions(self, (self.is_root, self._function))
        for name, parameter in self.parameters.items():
            if parameter.requires_grad and type(parameter) is not self._parameter_class:
                if isinstance(parameter, _WatchedParameter):
                    raise _held_by_another(name)
                if type(parameter) is nn.Parameter:
                    parameter.grad = None
                    parameter.__class__ = self._parameter_class
        for part in self._parts.values():
            if part.shown.requires_grad and type(part.shown) is part.plain:
                part.shown.grad = None
                part.shown.__class__ = part.watched

    def _follow_parts(self) -> None:
        """Makes own parts lie where what modules hold lies now, and train if that does."""
        for name, part in self._parts.items():
            local, shown = self.parameters[name], cast("Any", part.shown)
            held = shown.detach().to_local()
            if local.data_ptr() != held.data_ptr():
                local.data = held
            if local.requires_grad != part.shown.requires_grad:
                local.requires_grad_(part.shown.requires_grad)

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """Takes one more parameter."""
        self.parameters[name] = parameter
        self._names[id(parameter)] = name

    def meet(self, name: str, parameter: nn.Parameter) -> None:
        """Takes another object for a parameter from now on: one that was gathered from its shards, and is let go of."""
        self.transient = True
        self.add(name, parameter)

    def meet_part(self, name: str, shown: nn.Parameter, local: nn.Parameter) -> None:
        """Takes a tensor that modules hold, of which this process has a part, for a parameter from now on.

        Args:
            name: of the parameter.
            shown: what modules hold, and operations meet.
            local: the own part, in the same memory: what rules are told of.
        """
        self.meet(name, local)
        plain = type(shown)
        watched = type("WatchedPart", (_WatchedPart, plain), {"interceptor": self._interceptor})
        self._parts[name] = _Part(shown, plain, watched)
        self._part_names[id(shown)] = name

    @property
    def objects(self) -> list[nn.Parameter]:
        """Returns all objects that are parameters of this capture, or stand in for one in a module."""
        return [*self.parameters.values(), *(part.shown for part in self._parts.values())]

    def part(self, name: str) -> nn.Parameter | None:
        """Returns what modules hold of a parameter, if this process has a part of it, or None."""
        found = self._parts.get(name)
        return None if found is None else found.shown

    def local(self, value: object) -> nn.Parameter | None:
        """Returns the own part of a parameter of which each process holds one, or None for anything else."""
        name = self._part_names.get(id(value))
        return None if name is None else self.parameters[name]

    def unwatch(self) -> None:
        """Makes all parameters ordinary ones again."""
        look_at_functions(self, None)
        for part in self._parts.values():
            if isinstance(part.shown, _WatchedPart):
                cast("Any", part.shown).__class__ = part.plain
        for parameter in self.parameters.values():
            if type(parameter) is self._parameter_class:  # another capture may watch what two networks share
                parameter.__class__ = nn.Parameter

    def _function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of an autograd Function of roots alone."""
        watching = self._interceptor.watching
        return self._interceptor.intercept(func, args, kwargs) if watching else func(*args, **kwargs)

    # -- what a root is ----------------------------------------------------------------------------------------------

    def is_root(self, value: object) -> bool:
        """Returns whether `value` is a watched parameter, or derived from watched parameters alone."""
        kind = type(value)  # not isinstance, which asks the classes of torch: this is the hottest line of a forward
        return kind is self._derived_class or (kind is self._parameter_class and id(value) in self._names)

    def label(self, root: Tensor) -> str:
        """Returns a parameter's name, or a derived tensor's label."""
        return root.derivation.label if isinstance(root, _DerivedTensor) else self._names[id(root)]

    def target(self, root: Tensor) -> str | Derivation:
        """Returns what a use of the root is recorded under: a parameter's name, or the derivation of a tensor."""
        return root.derivation if isinstance(root, _DerivedTensor) else self._names[id(root)]

    def sources(self, root: Tensor) -> tuple[str, ...]:
        """Returns the names of the parameters that the root comes from."""
        return root.derivation.sources if isinstance(root, _DerivedTensor) else (self._names[id(root)],)

    def name(self, parameter: nn.Parameter) -> str:
        """Returns a parameter's name."""
        return self._names[id(parameter)]

    # -- new roots ---------------------------------------------------------------------------------------------------

    def derive(self, func: Callable[..., Any], args: Any, kwargs: Any, roots: Sequence[Tensor]) -> Any:
        """Runs `func` on roots and constants alone, and returns its result: derived tensors, which are roots again."""
        target = args[0] if args and isinstance(args[0], Tensor) else None
        written = None if target is None else target._version  # noqa: SLF001 - there is no public way to ask
        with _kept(copied=self.transient):
            result = fixed_lookup(func, roots[0], args, kwargs) if len(roots) == 1 else None
            result = func(*args, **kwargs) if result is None else result
        isometric = len(roots) == 1 and _isometric(roots[0]) and is_isometry(func, roots[0], args, kwargs, result)
        sources = tuple(dict.fromkeys(s for root in roots for s in self.sources(root)))
        label = _label(getattr(func, "__name__", str(func)), list(map(self.label, roots)), sources)
        call = next(self._calls)
        pieces = result if isinstance(result, list | tuple) else (result,)
        if target is not None and target._version != written:  # noqa: SLF001
            self._take_written(label, target, sources)

        def wrapped(t: Any, part: tuple[int, int] | None) -> Any:
            if not isinstance(t, Tensor) or not t.requires_grad:
                return t
            if isinstance(
                t, _DerivedTensor | _WatchedParameter
            ):  # an operation in place, or one that returns its input
                if isinstance(t, _DerivedTensor):
                    t.derivation = Derivation(label, t.as_subclass(Tensor), sources, isometric=False)
                return t
            derived: _DerivedTensor = self._watched(t)
            derived.derivation = Derivation(label, t, sources, isometric, part)
            return derived

        if pieces is not result:
            return wrapped(result, None)
        # Pieces of a whole parameter hold different entries of it. Pieces of pieces are not told apart.
        whole = isinstance(roots[0], _WatchedParameter)
        return type(result)(wrapped(t, (call, i) if whole else None) for i, t in enumerate(pieces))

    def _take_written(self, label: str, target: Tensor, sources: tuple[str, ...]) -> None:
        """Makes a constant that a parameter was written into a derived tensor; the same object is one from now on."""
        if type(target) is Tensor and target.requires_grad:
            target.__class__ = self._derived_class
        if isinstance(target, _DerivedTensor):
            target.derivation = Derivation(label, target.as_subclass(Tensor), sources, isometric=False)

    def _watched(self, t: Tensor) -> Any:
        """Returns a tensor like `t` that answers for torch functions."""
        if not tracing():
            return t.as_subclass(self._derived_class)
        alias = t.view_as(t)
        alias.__class__ = self._derived_class  # a graph knows a tensor as the object that it is
        return alias


def _label(function: str, of: Sequence[str], sources: Sequence[str]) -> str:
    """Returns how a derived tensor is called in messages: what was done, or only of which parameters if it is much."""
    label = f"{function}({', '.join(of)})"
    return label if len(label) <= _LONGEST else f"{function}(... of {', '.join(sources)})"


def _held_by_another(name: str) -> ProtocolError:
    return ProtocolError(
        f"{name} is shared with another private module, whose forward still waits for its backward: one backward "
        "through both would leave no gradient for each. Expected forward, backward and step of one network before the "
        "forward of the other; eval() or no_grad() where a network is only looked at. For one loss of both networks, "
        "put them into one module, such as a ModuleDict with a forward that runs both, and make that private."
    )


def _kept(*, copied: bool) -> AbstractContextManager[object]:
    """Returns a context in which what the way back of a derivation needs is kept for as long as the derivation.

    Args:
        copied: whether it is copied. The memory of a gathered parameter is let go of before.
    """
    if copied:
        return saved_tensors_hooks(Tensor.clone, _same)
    # A checkpoint would drop it, and compute it again in the backward alone. The way back is gone after that.
    return saved_tensors_hooks(Tensor.detach, _same) if _saved_elsewhere() else nullcontext()


def _saved_elsewhere() -> bool:
    """Returns whether hooks, such as a checkpoint's, decide now where autograd saves tensors."""
    top: Callable[[bool], object] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # noqa: SLF001
    return top is not None and top(False) is not None


def _same(t: Tensor) -> Tensor:
    return t


def _isometric(root: Tensor) -> bool:
    return root.derivation.isometric if isinstance(root, _DerivedTensor) else True
