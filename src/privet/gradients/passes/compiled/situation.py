"""What a traced graph holds for: all that Python knows of a batch, a model and its surroundings, to be compared.

What a graph holds is fixed; so whatever can be another in the next step, and is not an input of the graph, has to be
a part of the situation. Tensors are told by identity: a graph reads the tensors that it met as they are then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privet.batches.structure import is_container, parts_of, places_in, rebuilt
from privet.errors import ConfigurationError

__all__ = ["Place", "kinds", "plain_attributes", "surroundings", "taken_apart", "tensor_attributes"]

Place = tuple[str, str]
"""A module, by its name, and an attribute of it."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Returns all of the tensors but their values."""
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """Returns torch's own settings that decide which operations a forward becomes."""
    cast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if cast else None, torch.get_default_dtype()


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


def taken_apart(batch: Any) -> tuple[list[Tensor], Any, Callable[[Sequence[Tensor]], Any]]:
    """Returns the tensors of a batch, all else that there is of it, and how to put it together of other tensors.

    Raises:
        ConfigurationError: if there is something in it that cannot be compared.
    """
    tensors: list[Tensor] = []

    def form_of(part: Any, where: str) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part)
            return Tensor
        if isinstance(part, _PLAIN):
            return type(part), repr(part)
        if is_container(part):
            places = places_in(part)
            inner = (form_of(p, f"{where}[{k!r}]") for k, p in zip(places, parts_of(part), strict=True))
            return type(part), tuple(places), tuple(inner)
        raise ConfigurationError(
            f"{where} is of type {type(part).__name__}, which cannot be an input of a graph. Expected tensors, plain "
            "values, and containers of them. Make arrays tensors in collate_fn, or train with compile=False."
        )

    def put(part: Any, left: Iterator[Tensor]) -> Any:
        if isinstance(part, Tensor):
            return next(left)
        return rebuilt(part, [put(p, left) for p in parts_of(part)]) if is_container(part) else part

    form = form_of(batch, "the batch")
    return tensors, form, lambda others: put(batch, iter(others))
