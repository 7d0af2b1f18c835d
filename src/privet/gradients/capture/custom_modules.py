"""Modules with a rule of the user's own: hooks that make each of them one operation while it is watched."""

from __future__ import annotations

from collections.abc import MutableSet, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from privet.errors import UnsupportedModelError
from privet.gradients.capture.capture import Capture
from privet.gradients.capture.cycle import Cycle
from privet.gradients.capture.hook import Hook, nothing
from privet.gradients.rules.custom import ModuleUse, module_rule

__all__ = ["watch_custom_modules"]


class _Watch:
    """The two hooks of one module, which hide its parameters while it runs and take it as one operation."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        # By call that has not returned: None for one that is not watched; and parameters that it keeps from autograd.
        self._entered: list[tuple[Cycle | None, list[nn.Parameter]]] = []

    # A call of the module is one entry of the list, so that a module may be called from inside of itself.

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cycle = self._capture.enter_module(module)
        kept = [] if cycle is None else [p for p in module.parameters() if p.requires_grad]
        _let_train(kept, False)  # an autograd Function inside, which is not seen, sends them no gradient of its own
        self._entered.append((cycle, kept))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cycle, kept = self._entered.pop() if self._entered else (None, [])
        _let_train(kept, True)
        if cycle is None:
            return None
        rule = module_rule(module)
        if output is None or rule is None:  # the module raised
            self._capture.show_module(cycle)
            return None
        if kwargs or not isinstance(output, Tensor):
            self._capture.show_module(cycle)
            raise UnsupportedModelError(
                f"the rule registered for {type(module).__name__} met a call with keyword arguments {sorted(kwargs)} "
                f"and a result of type {type(output).__name__}. Expected positional arguments, and one tensor as the "
                "result."
            )
        roots = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not roots:  # a part of a module that is itself one operation
            self._capture.show_module(cycle)
            return None
        operation = ModuleUse(module, rule, args, tuple(roots))
        data = [*(a for a in args if isinstance(a, Tensor)), output]
        return self._capture.leave_module(cycle, module, operation, data, roots)


def _let_train(parameters: Sequence[nn.Parameter], trained: bool) -> None:  # noqa: FBT001 - it says what it sets
    """Sets whether autograd looks at these parameters, without being watched itself."""
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        for parameter in parameters:
            parameter.requires_grad_(trained)


def watch_custom_modules(
    module: nn.Module, capture: Capture, *, but: MutableSet[nn.Module] | None = None
) -> list[RemovableHandle]:
    """Makes every module inside `module` that has a registered rule one operation; returns the hooks' handles.

    Args:
        module: the private module.
        capture: takes the operations.
        but: modules that are one operation already. Those that become so are added.
    """
    done = but if but is not None else set()
    handles: list[RemovableHandle] = []
    for child in module.modules():
        if child not in done and module_rule(child) is not None and any(p.requires_grad for p in child.parameters()):
            done.add(child)
            watch = _Watch(capture)
            enter, leave = Hook(watch.enter, nothing), Hook(watch.leave, nothing)
            handles.append(child.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(child.register_forward_hook(leave, with_kwargs=True, always_call=True))
    return handles
