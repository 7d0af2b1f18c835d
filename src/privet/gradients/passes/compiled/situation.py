"""What a traced graph holds for: all that Python knows of a batch, a model and its surroundings, to be compared.

What a graph holds is fixed; so whatever can be another in the next step, and is not an input of the graph, has to be
a part of the situation. Tensors are told by identity: a graph reads the tensors that it met as they are then.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.structure import context_of, is_container, parts_of, steps_to
from privet.batches.tree import is_plain
from privet.errors import ConfigurationError
from privet.gradients.precision import eps_in_force

__all__ = ["Place", "form_of", "kinds", "plain_attributes", "surroundings", "tensor_attributes"]

Place = tuple[str, str]
"""A module, by its name, and an attribute of it."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Returns all of the tensors but their values."""
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """Returns torch's own settings that decide which operations a forward becomes."""
    cast = torch.is_autocast_enabled(device.type)
    precision = eps_in_force(torch.float32, device, kind="convolution"), eps_in_force(torch.float32, device)
    return torch.get_autocast_dtype(device.type) if cast else None, torch.get_default_dtype(), precision


def plain_attributes(module: nn.Module) -> tuple[Any, ...]:
    """Returns the plain values that modules hold: modes, rates of dropout, numbers that a schedule sets."""
    found: list[Any] = []
    for name, child in module.named_modules():
        found.append((name, type(child)))
        for key, value in vars(child).items():
            if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)):
                found.append((key, repr(value)))
    return tuple(found)


def tensor_attributes(module: nn.Module, *, but: Collection[Place] = ()) -> dict[Place, Tensor]:
    """Returns the tensors that modules hold and that are neither parameters nor buffers."""
    return {
        (name, key): value
        for name, child in module.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, Tensor) and (name, key) not in but
    }


def form_of(batch: Any, path: str = "the batch") -> Any:
    """Returns all that there is of a batch but its tensors, to be compared with that of another batch.

    Raises:
        ConfigurationError: if there is something in it that cannot be compared, with its path.
    """
    if isinstance(batch, Tensor):
        return Tensor
    if is_plain(batch):
        return type(batch), repr(batch)
    if is_container(batch):
        steps = tuple(steps_to(batch))
        inner = (form_of(part, path + step) for step, part in zip(steps, parts_of(batch), strict=True))
        return type(batch), steps, tuple(inner), _form_of_context(context_of(batch), path)
    raise _unfit(batch, path)


def _form_of_context(context: Any, path: str) -> Any:
    """Returns what a registered class keeps besides its parts, as values that nobody can change any more."""
    if is_plain(context):
        return type(context), repr(context)
    if isinstance(context, list | tuple):
        return type(context), tuple(_form_of_context(part, path) for part in context)
    if isinstance(context, type) or callable(context):
        return context
    raise _unfit(context, f"the context of {path}")


def _unfit(value: Any, path: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} is of type {type(value).__name__}, which cannot be an input of a graph. Expected tensors, plain "
        "values, and containers of them. Make arrays and packed sequences tensors in collate_fn, or train with "
        "compile=False."
    )
