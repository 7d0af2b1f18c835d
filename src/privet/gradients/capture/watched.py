"""Tensors that are watched: parameters of the private model, and what is derived from them alone.

A watched tensor is an instance of a subclass that answers for torch functions (`__torch_function__`). A parameter
becomes one for a while by a change of its class, and stays the same object: optimizers, `state_dict` and the user's own
references never notice.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction

from privet.gradients.derived import Derivation, is_isometry
from privet.gradients.tracing import tracing

__all__ = ["Interceptor", "Roots"]


class Interceptor(Protocol):
    """Takes the torch functions in which watched tensors take part (implemented by `Capture`)."""

    @property
    def watching(self) -> bool:
        """Returns whether operations are looked at now."""

    @property
    def learning(self) -> bool:
        """Returns whether the forward is one that is only looked at, and has no backward."""

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records one operation, and returns its result."""


def _is_computed_again() -> bool:
    """Returns whether this is the forward, without gradients, of a part that a reentrant checkpoint computes again.

    In training the part is captured when the backward computes it again. A forward that has no backward sees it now.
    """
    frame: FrameType | None = sys._getframe()  # noqa: SLF001
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


class _Watched:
    """Answers for torch functions on behalf of a tensor. Each capture makes subclasses of its own that point to it."""

    interceptor: ClassVar[Interceptor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Handlers compute with the same tensors: what they call must not be intercepted again.
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            if cls.interceptor.watching:
                if torch.is_grad_enabled():
                    return cls.interceptor.intercept(func, args, kwargs or {})
                if cls.interceptor.learning and _is_computed_again():
                    with torch.enable_grad():
                        return cls.interceptor.intercept(func, args, kwargs or {})
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
        self._calls = itertools.count()

    def watch(self) -> None:
        """Makes the parameters that train watched ones, and drops what is in their `grad`.

        That is the last step's private gradient, which the optimizer has taken.
        """
        for parameter in self.parameters.values():
            if parameter.requires_grad and type(parameter) is nn.Parameter:
                parameter.grad = None
                parameter.__class__ = self._parameter_class

    def meet(self, name: str, parameter: nn.Parameter) -> None:
        """Takes another object for a parameter from now on: one that was gathered from its shards, and is let go of."""
        self.transient = True
        self.parameters[name] = parameter
        self._names[id(parameter)] = name

    def unwatch(self) -> None:
        """Makes all parameters ordinary ones again."""
        for parameter in self.parameters.values():
            if isinstance(parameter, _WatchedParameter):
                parameter.__class__ = nn.Parameter  # type: ignore[assignment]

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
        isometric = len(roots) == 1 and is_isometry(func, args) and _isometric(roots[0])
        # What the way back needs of a gathered parameter is copied, before its memory is let go of.
        kept = saved_tensors_hooks(Tensor.clone, _same) if self.transient and not isometric else nullcontext()
        with kept:
            result = func(*args, **kwargs)
        sources = tuple(dict.fromkeys(s for root in roots for s in self.sources(root)))
        label = f"{getattr(func, '__name__', func)}({', '.join(map(self.label, roots))})"
        call = next(self._calls)
        pieces = result if isinstance(result, list | tuple) else (result,)

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

    def _watched(self, t: Tensor) -> Any:
        """Returns a tensor like `t` that answers for torch functions."""
        if not tracing():
            return t.as_subclass(self._derived_class)
        alias = t.view_as(t)
        alias.__class__ = self._derived_class  # a graph knows a tensor as the object that it is
        return alias


def _same(t: Tensor) -> Tensor:
    return t


def _isometric(root: Tensor) -> bool:
    return root.derivation.isometric if isinstance(root, _DerivedTensor) else True
