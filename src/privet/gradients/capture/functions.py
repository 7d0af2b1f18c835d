"""Custom autograd Functions of parameters alone: what they return is derived from parameters, as with torch's own.

An adapter may make its change of a weight by a Function of its own, and a quantised layer its weight. Torch asks no
tensor about `Function.apply`, so the parameters, while they are watched, are looked for among its arguments. A Function
that meets anything else, such as data, is left alone, and a gradient that comes by it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["APPLY", "look_at_functions"]

Intercept = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
IsRoot = Callable[[object], bool]

APPLY: Any = torch.autograd.Function.__dict__["apply"]
"""Torch's own, for Functions that are nobody else's matter."""
_looking: WeakKeyDictionary[object, tuple[WeakMethod[IsRoot], WeakMethod[Intercept]]] = WeakKeyDictionary()
"""What watches parameters now. A model that was left in its middle is let go of with its last reference."""


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns what torch's own `apply` does, as a derived tensor if it is made of parameters alone."""
    plain = APPLY.__get__(None, cls)
    tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
    roots = [t for t in tensors if t.dim() or t.requires_grad]
    if not roots or issubclass(cls, CheckpointFunction) or not torch.is_grad_enabled():
        return plain(*args, **kwargs)
    for of_root, of_intercept in list(_looking.values()):
        is_root, intercept = of_root(), of_intercept()
        if is_root is not None and intercept is not None and all(map(is_root, roots)):

            def named(*args: Any, **kwargs: Any) -> Any:
                return plain(*args, **kwargs)

            named.__name__ = cls.__name__
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                return intercept(named, args, kwargs)
    return plain(*args, **kwargs)


def look_at_functions(who: object, what: tuple[IsRoot, Intercept] | None) -> None:
    """Has Functions of parameters alone intercepted, until it is called with None.

    Args:
        who: watches parameters.
        what: its methods that say what is watched, and take a call.
    """
    if what is None:
        _looking.pop(who, None)
    else:
        _looking[who] = WeakMethod(what[0]), WeakMethod(what[1])
    found: Any = classmethod(_apply) if _looking else APPLY
    torch.autograd.Function.apply = found  # type: ignore[method-assign]
