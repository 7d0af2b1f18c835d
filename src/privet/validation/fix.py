"""Replacements for what `validate` refuses: the same model, with other normalisations and safe options."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from privet.errors import UnsupportedModelError
from privet.validation.norms import replace_norm
from privet.validation.rules import require_valid, validate

__all__ = ["get_compatible_module"]


def get_compatible_module(module: nn.Module) -> nn.Module:
    """Returns a copy of the module in which everything that `validate` refuses is replaced; the original is untouched.

    | found                                           | put in its place                                             |
    |-------------------------------------------------|--------------------------------------------------------------|
    | batch norm, in training mode or without statistics | `GroupNorm`, the weight and bias kept                     |
    | batch or instance norm in eval mode, statistics | `FixedNorm`: the same numbers as now, in either mode         |
    | a class of somebody else's that is one of these followed by its own parts | the same, followed by these parts  |
    | instance norm that tracks statistics            | the same without them                                        |
    | embedding with max_norm, scale_grad_by_freq, sparse | the same without them                                    |

    A part that occurs several times stays one part, and forward and backward hooks stay. A copy that computes
    something else than the original (group for batch normalisation) needs training or fine-tuning. The optimizer must
    be made from the copy's parameters.

    Raises `UnsupportedModelError`, naming what is left, where there is no replacement, or where one would lose a part
    of what the model computes.
    """
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        require_valid(module)  # which names them; they cannot be copied
    if not validate(module):
        return copy.deepcopy(module)
    with torch.no_grad():
        copied = copy.deepcopy(module)
    memo: dict[nn.Module, nn.Module] = {}
    lost: list[str] = []
    for path, child in list(copied.named_modules()):
        replaced = _replacement(child)
        if isinstance(replaced, str):
            lost.append(f"  {path or '(the model itself)'} ({type(child).__name__}): {replaced}")
        elif replaced is not child:
            memo[child] = replaced
    if lost:
        raise UnsupportedModelError(
            "there is no replacement that computes the same as these parts do, so that nothing was replaced:\n"
            + "\n".join(lost)
        )
    for parent in list(copied.modules()):
        for name, part in list(parent._modules.items()):  # noqa: SLF001  children() drops a part named twice
            if part in memo:
                setattr(parent, name, memo[part])
    fixed = memo.get(copied, copied)
    require_valid(fixed)
    return fixed


def _replacement(module: nn.Module) -> nn.Module | str:
    """Returns what takes the place of one part, which may be the part itself; or why nothing can."""
    if isinstance(module, _NormBase):
        return replace_norm(module)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.max_norm = None
        module.scale_grad_by_freq = False
        module.sparse = False
    return module
