"""Small questions about modules and their parameters, at the names that Opacus gives them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "are_state_dict_equal",
    "clone_module",
    "get_submodule",
    "has_trainable_params",
    "parametrized_modules",
    "requires_grad",
    "trainable_modules",
    "trainable_parameters",
]


def has_trainable_params(module: nn.Module) -> bool:
    """Returns whether some parameter of the module itself is trainable."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def parametrized_modules(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yields name and module of each part that has parameters of its own."""
    for name, part in module.named_modules():
        if next(part.parameters(recurse=False), None) is not None:
            yield name, part


def trainable_modules(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yields name and module of each part that has trainable parameters of its own."""
    return ((name, part) for name, part in parametrized_modules(module) if has_trainable_params(part))


def trainable_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Yields name and parameter of each trainable parameter."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def requires_grad(module: nn.Module, *, recurse: bool = False) -> bool:
    """Returns whether some parameter is trainable; by default of those of the module itself."""
    return any(p.requires_grad for p in module.parameters(recurse))


def clone_module(module: nn.Module) -> nn.Module:
    """Returns a deep copy of the module."""
    return copy.deepcopy(module)


def get_submodule(module: nn.Module, target: str) -> nn.Module:
    """Returns the part at a dotted path; raises AttributeError if there is none."""
    return module.get_submodule(target)


def are_state_dict_equal(sd1: Mapping[str, Tensor], sd2: Mapping[str, Tensor]) -> bool:
    """Returns whether two states have the same keys and, up to rounding, the same values."""
    return sd1.keys() == sd2.keys() and all(torch.allclose(value, sd2[key]) for key, value in sd1.items())
