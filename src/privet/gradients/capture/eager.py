"""Private forwards run eagerly: what torch.compile has to do with them.

A compiled part hides its operations, and with them the uses of parameters. So a model that is compiled before it is
made private runs eagerly while it is trained, and keeps its compiled code for all else; a warning says so. One that is
compiled afterwards would take the hooks for a part of the model: its training is refused at the first call.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from privet.errors import UnsupportedModelError

__all__ = ["eagerly", "refuse_compiled", "set_stance", "warn_of_compiled"]

_WHOLE = (
    "privet.PrivateStep(..., performance=privet.Performance(compile=True)) compiles the whole private step: forward, "
    "backward and clipping"
)


def set_stance(stance: Any = None) -> Any:
    """Sets what torch.compile does, by default nothing, and returns what it did; None if it is not in use."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return None
    try:
        return dynamo._set_stance(dynamo.DynamoStance("force_eager") if stance is None else stance)  # noqa: SLF001
    except RuntimeError:  # inside of a compiled region, where it cannot be changed
        return None


@contextmanager
def eagerly() -> Iterator[None]:
    """Runs compiled parts eagerly inside of this context: a check meets each shape once, and compiling takes long."""
    before = set_stance()
    config: Any = sys.modules.get("torch._dynamo.config")
    # Inside of the trace of a whole step, too, which else refuses parts that were compiled.
    nested = nullcontext() if config is None else config.patch(error_on_nested_fx_trace=False)
    try:
        with nested:
            yield
    finally:
        if before is not None:
            set_stance(before)


def warn_of_compiled(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Warns if a module, a part of it or a function is compiled; undoes `module.compile()`, which would hide the hooks.

    Args:
        module: is made private.
        functions: are called in a private forward.
    """
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    wrapper: tuple[type, ...] = () if dynamo is None else (dynamo.OptimizedModule,)
    found = [
        name or "the model"
        for name, part in module.named_modules()
        if isinstance(part, wrapper) or getattr(part, "_compiled_call_impl", None) is not None
    ]
    found += ["the loss" for each in functions if hasattr(each, "_torchdynamo_orig_callable")]
    if not found:
        return
    if not isinstance(module, wrapper):
        module._compiled_call_impl = None  # noqa: SLF001 - torch has no way to take compile() back
    warnings.warn(
        f"torch.compile was called on {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}. Private training runs "
        "it eagerly, at the speed of code that is not compiled: each use of a parameter has to be seen. The result is "
        f"the same. For compiled training: {_WHOLE}. Leave torch.compile away to be rid of this warning.",
        stacklevel=4,
    )


def refuse_compiled(*, trains: bool) -> None:
    """Raises if torch.compile traces the code that runs now, and it trains; returns in an ordinary run.

    The trace ends here, before anything of this library is compiled.
    """
    if trains and torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break()  # noqa: SLF001 - what follows is run, not traced
        raise UnsupportedModelError(
            "torch.compile was called on a private model, or on a function that trains it: its hooks would be compiled "
            "with it, and uses of parameters would not be seen. Expected it to be called eagerly. Leave torch.compile "
            f"away; or, for compiled training: {_WHOLE}. In eval mode and under no_grad it may be compiled."
        )
