"""Tensors computed from parameters alone (a slice, a transpose, a weight norm): parameters in all but name.

An operation on parameters and constants has no examples in it. Its result is kept as a `Derivation`, and per-example
gradients of it are pulled back to the parameters by its own autograd graph, which is linear in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Derivation", "disjoint", "is_isometry", "pull_back", "pull_back_rows"]

_F = Tensor
_ISOMETRIES = frozenset(
    {
        _F.t, torch.t, _F.T.__get__, _F.mT.__get__, _F.transpose, torch.transpose, _F.swapaxes, torch.swapaxes,  # type: ignore[attr-defined]
        _F.swapdims, torch.swapdims, _F.permute, torch.permute, _F.movedim, torch.movedim, _F.view, _F.reshape,
        torch.reshape, _F.contiguous, _F.clone, torch.clone, _F.squeeze, torch.squeeze, _F.unsqueeze, torch.unsqueeze,
        _F.flatten, torch.flatten, _F.unflatten, torch.unflatten, _F.narrow, torch.narrow, _F.select, torch.select,
        _F.chunk, torch.chunk, _F.split, torch.split, _F.unbind, torch.unbind, _F.neg, torch.neg, _F.__neg__,
        _F.view_as, _F.reshape_as, _F.flip, torch.flip,
    }
)  # fmt: skip


def _indexes_once(index: Any) -> bool:
    """Returns whether indexing takes each element at most once: integers, slices and the like, no index tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts)


def is_isometry(function: Any, args: Sequence[Any]) -> bool:
    """Returns whether a gradient keeps its norm on the way back through `function`: entries move, none is added."""
    if function is Tensor.__getitem__:
        return _indexes_once(args[1])
    return function in _ISOMETRIES


@dataclass(frozen=True, eq=False)
class Derivation:
    """A tensor derived from parameters, and where it came from."""

    label: str
    tensor: Tensor  # with its autograd graph
    sources: tuple[str, ...]  # the parameters it depends on
    isometric: bool  # a gradient keeps its norm on the way back
    part: tuple[int, int] | None = None  # (call, piece): pieces of one call hold different entries


def disjoint(derivations: Sequence[Derivation]) -> bool:
    """Returns whether the pulled-back gradients of these derivations never meet in one entry."""
    if len(derivations) == 1:
        return True
    if any(d.part is None for d in derivations):
        return False
    calls = {d.part[0] for d in derivations if d.part}
    return len(calls) == 1 and len({d.part for d in derivations}) == len(derivations)


def pull_back(
    derivation: Derivation, parameter: Tensor, gradient: Tensor
) -> Tensor:  # derived shape -> parameter shape
    """Returns the parameter's gradient for a gradient of the derived tensor."""
    result: Tensor | None = torch.autograd.grad(
        derivation.tensor, [parameter], gradient.to(derivation.tensor.dtype), retain_graph=True, allow_unused=True
    )[0]
    return torch.zeros_like(parameter) if result is None else result.contiguous()  # noise is added in place


def pull_back_rows(derivation: Derivation, parameter: Tensor, rows: Tensor) -> Tensor:  # (R, *derived) -> (R, *shape)
    """Returns the parameter's gradient for each row's gradient of the derived tensor."""
    if rows.shape[0] == 0:
        return rows.new_zeros(0, *parameter.shape)
    return torch.stack([pull_back(derivation, parameter, row) for row in rows])
