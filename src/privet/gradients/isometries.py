"""Which functions of one parameter keep the norm of a gradient on its way back: entries move, and none is scaled.

Then the norm is known from the gradient of the result, and nothing has to be pulled back before the weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privet.gradients.tracing import tracing

__all__ = ["INDEX_SELECT", "is_isometry", "looked_up"]

INDEX_SELECT: Any = torch._C._VariableFunctions.index_select  # noqa: SLF001
"""Torch's own: PyTorch Geometric puts a function of its own in the place of `torch.index_select`, which calls it."""

_T = Tensor
_MOVES = frozenset(
    {
        _T.t, torch.t, _T.T.__get__, _T.mT.__get__, _T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes,  # type: ignore[attr-defined]
        _T.swapdims, torch.swapdims, _T.permute, torch.permute, _T.movedim, torch.movedim, _T.view, _T.reshape,
        torch.reshape, _T.contiguous, _T.clone, torch.clone, _T.squeeze, torch.squeeze, _T.unsqueeze, torch.unsqueeze,
        _T.flatten, torch.flatten, _T.unflatten, torch.unflatten, _T.narrow, torch.narrow, _T.select, torch.select,
        _T.chunk, torch.chunk, _T.split, torch.split, _T.unbind, torch.unbind, _T.neg, torch.neg, _T.__neg__,
        _T.view_as, _T.reshape_as, _T.flip, torch.flip,
    }
)  # fmt: skip
_SHIFTS = frozenset(
    {
        torch.add, _T.add, _T.__add__, _T.__radd__, torch.sub, _T.sub, _T.__sub__, _T.__rsub__, torch.subtract,
        _T.subtract, torch.rsub,
    }
)  # fmt: skip
_OPTIONS: dict[str, Any] = {
    "padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False
}  # fmt: skip
_EMBEDDING = {"input": None, "weight": None, **_OPTIONS}


def is_isometry(
    function: Callable[..., Any], root: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> bool:
    """Returns whether a gradient keeps its norm on the way back through `function`.

    Args:
        function: takes one parameter, once, and constants.
        root: the parameter.
        args: the positional arguments.
        kwargs: those given by name.
        result: what the function returned.
    """
    if function in _MOVES:
        return True
    if function in _SHIFTS:  # of a constant; a parameter that is spread over more entries gets the sum of theirs
        return not kwargs and len(args) == 2 and (result.shape, result.dtype) == (root.shape, root.dtype)
    if function is Tensor.__getitem__:
        return _takes_once(root, args[1])
    if function in (INDEX_SELECT, Tensor.index_select) and len(args) == 3 and not kwargs:
        return _distinct(args[2], root.shape[args[1]] if root.dim() else 0)
    if function is F.embedding:
        return _distinct(looked_up(args, kwargs), root.shape[0])
    return False


def looked_up(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the places of `F.embedding`, or None where one of its options changes what is learned."""
    given = {**dict(zip(_EMBEDDING, args, strict=False)), **kwargs}
    return given.get("input") if {**_EMBEDDING, **given}.items() >= _OPTIONS.items() else None


def _takes_once(root: Tensor, index: Any) -> bool:
    """Returns whether indexing takes each element at most once: by places and slices, or by one tensor of places."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in parts):
        return True
    return len(parts) == 1 and root.dim() > 0 and _distinct(parts[0], root.shape[0])


def _distinct(places: Any, entries: int) -> bool:
    """Returns whether no entry is taken twice. A traced graph cannot tell: other places may come in the next batch."""
    if not isinstance(places, Tensor) or places.dtype not in (torch.int64, torch.int32) or tracing():
        return False
    if places.numel() > entries:
        return False
    return bool(torch.unique(places.detach() % max(entries, 1)).numel() == places.numel())
