"""A module, an optimizer and a parameter are made private once: twice would clip and noise their gradients twice."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from privet.errors import ProtocolError
from privet.gradients.capture.hook import is_copy

__all__ = ["made_private", "refuse_private"]

_THINGS: weakref.WeakSet[Any] = weakref.WeakSet()

_WAY_ON = (
    "Build a new module of its class, load_state_dict() what this one learned, build its optimizer, and make those "
    "private: with the same engine, whose ledger goes on."
)


def made_private(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Takes note of what was made private."""
    _THINGS.update((module, optimizer))


def refuse_private(module: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises if something was made private before, or is a copy of what was."""
    for thing in (module, optimizer):
        if thing in _THINGS:
            raise ProtocolError(
                f"this {type(thing).__name__} was made private before: its gradients would be clipped and noised "
                f"twice. Expected one make_private for each module and optimizer. {_WAY_ON}"
            )
    parts = dict(module.named_modules())
    inside = [name for name, child in parts.items() if name and child in _THINGS]
    if inside:
        raise ProtocolError(
            f"parts of the module were made private before: {', '.join(inside)}. Expected one make_private for a "
            "module with all its parts. Make one of the two private."
        )
    if any(is_copy(child) for child in parts.values()):
        raise ProtocolError(
            f"this {type(module).__name__} is a copy of a private module, and carries its hooks, which refuse to "
            f"train. Expected a module that was never private. {_WAY_ON}"
        )
    # The modules are asked, for a weak reference to a parameter would keep torch from swapping it for another type.
    private = {
        id(p) for other in _THINGS if isinstance(other, nn.Module) for p in other.parameters() if p.requires_grad
    }
    shared = [name for name, p in parameters.items() if id(p) in private]
    if shared:
        raise ProtocolError(
            f"another private module has these parameters too: {', '.join(shared)}. Two networks that share a layer "
            "have one gradient for it. Expected each parameter in one private module. Put both networks into one "
            "module, such as a ModuleDict with a forward that runs what is asked for, and make that private."
        )
