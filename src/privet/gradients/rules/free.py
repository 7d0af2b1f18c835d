"""A parameter that meets data element by element: bare parameters, scales, position embeddings, class tokens.

Whatever the elementwise operation, the parameter is first expanded to the data's shape. Expansion is the use; torch
does the rest, and the expanded tensor's gradient, summed over the axes of one example that share an entry, is the
per-example gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from privet.errors import UnsupportedModelError
from privet.gradients.layout import Layout
from privet.gradients.rows import wide
from privet.gradients.rules.registry import Call, handles
from privet.gradients.use import Operation, Rule, Uses

__all__ = ["EXPANSIONS", "Broadcast", "expanded", "expansion"]

_T = Tensor
ELEMENTWISE = (
    torch.add, _T.add, _T.__add__, _T.__radd__, _T.add_, _T.__iadd__, torch.sub, _T.sub, _T.__sub__, _T.__rsub__,
    _T.sub_, _T.__isub__, torch.subtract, _T.subtract, torch.mul, _T.mul, _T.__mul__, _T.__rmul__, _T.mul_,
    _T.__imul__, torch.multiply, _T.multiply, torch.div, _T.div, _T.__truediv__, _T.__rtruediv__, _T.div_,
    _T.__itruediv__, _T.__rdiv__, torch.divide, _T.divide, torch.true_divide, torch.pow, _T.pow, _T.__pow__,
    _T.__rpow__, torch.maximum, _T.maximum, torch.minimum, _T.minimum, torch.where, _T.where, torch.lerp, _T.lerp,
    torch.addcmul, _T.addcmul, torch.addcdiv, _T.addcdiv, torch.clamp, _T.clamp, torch.atan2, _T.atan2, torch.hypot,
    torch.rsub, torch.logaddexp, torch.masked_fill, _T.masked_fill,
)  # fmt: skip

_COPIES = frozenset({_T.repeat, torch.tile, _T.tile})
EXPANSIONS = frozenset({_T.expand, _T.expand_as, torch.broadcast_to, _T.broadcast_to}) | _COPIES


class _Expanded(Rule):
    """The sum of the expanded tensor's gradient over the axes along which the parameter was repeated."""

    def per_example(self, uses: Uses) -> Tensor:
        rows = [_reduced(wide(use.gradient), use.shape, use.operation) for use in uses]
        return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)


def _reduced(gradient: Tensor, shape: tuple[int, ...], operation: Operation) -> Tensor:  # (B, ...) -> (B, *shape)
    assert isinstance(operation, Broadcast)
    kept = operation.trailing  # the axes of the parameter that line up with the data's last axes
    rows = gradient.shape[0]
    if not gradient.numel():
        return gradient.new_zeros(rows, *shape)
    lined_up = gradient.shape[gradient.dim() - len(kept) :] if kept else ()
    body = gradient.reshape(rows, -1, *lined_up).sum(1)
    for axis, size in enumerate(kept):
        if size == 1 and body.shape[axis + 1] != 1:
            body = body.sum(axis + 1, keepdim=True)
    return body.reshape(rows, *shape)


class Broadcast(Operation):
    """A parameter expanded to the shape of the data it meets."""

    positionwise = True
    rules: Mapping[str, Rule] = {"value": _Expanded()}

    def __init__(self, shape: Sequence[int], trailing: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.trailing = tuple(trailing)

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Returns the parameter, expanded without a copy."""
        return values["value"].expand(self.shape)

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Returns nothing: there are no data."""
        return ()


def expanded(call: Call, root: Tensor, shape: Sequence[int], layout: Layout) -> Tensor:
    """Returns `root` expanded to the shape of data that lie as in `layout`."""
    axis = layout.axis
    aligned = (1,) * (len(shape) - root.dim()) + tuple(root.shape)
    if aligned[axis] != 1:
        raise UnsupportedModelError(
            f"{call.label(root)} of shape {tuple(root.shape)} meets data of shape {tuple(shape)} along the batch axis "
            f"{axis}: its entries would belong to places in the batch. Expected size 1 there. Give the parameter a "
            "shape without the batch axis."
        )
    trailing = aligned[:axis] + aligned[axis + 1 :]  # as the gradient lies once the examples are first
    while trailing and trailing[0] == 1 and len(trailing) > 1:
        trailing = trailing[1:]
    return call.apply(Broadcast(shape, trailing), (), {"value": root}, layout=layout)  # type: ignore[no-any-return]


@handles(*ELEMENTWISE, structural=True)
def _elementwise(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    data = [t for t in tensors if call.layout(t) is not Layout.CONSTANT]
    full = [t for t in data if t.dim() == len(shape)]
    if not full:
        return NotImplemented
    layout = call.layout(full[0])
    return func(*_withexpanded(call, args, shape, layout), **_withexpanded(call, kwargs, shape, layout))


def _withexpanded(call: Call, arguments: Any, shape: Sequence[int], layout: Layout) -> Any:
    return tree_map(lambda a: expanded(call, a, shape, layout) if call.is_root(a) else a, arguments)


def expansion(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns a parameter expanded along the batch, as a use; NotImplemented where the batch has no part in it."""
    root = args[0]
    result = func(*args, **kwargs)
    layout = call.layout_of_result(func, root, result)
    if layout is Layout.CONSTANT:
        return NotImplemented
    if func in _COPIES and layout is Layout.MERGED and root.dim() and result.shape[1:] == root.shape[1:]:
        # One copy of the parameter after the other: the examples are outside, and its own first axis inside.
        copies = result.shape[0] // max(root.shape[0], 1)
        if root.shape[0] > 1 and copies * root.shape[0] == result.shape[0]:
            return expanded(call, root, (copies, *root.shape), layout).flatten(0, 1)
    axis = layout.axis
    wanted = [1 if place == axis else size for place, size in enumerate(result.shape)]  # nothing of it is an example's
    repeats = math.prod(result.shape) // max(root.numel(), 1)
    if root.numel() * repeats != math.prod(result.shape) or any(
        size not in (1, want) for size, want in zip(root.shape[::-1], wanted[::-1], strict=False)
    ):
        return NotImplemented
    found = expanded(call, root, result.shape, layout)
    return found.contiguous() if func in _COPIES else found  # in memory as torch has it, for a view of it


@handles(_T.__setitem__, structural=True)
def _assigned(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter written into data: at a mask's positions, as masked embeddings are, or at fixed places."""
    target, index, value = args
    if call.is_root(target) or not call.is_root(value):
        return NotImplemented
    layout = call.layout(target)
    if layout not in (Layout.ROWS, Layout.SECOND):
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        axes = index.dim()
        inside = target.shape[axes:]
        if call.is_root(index) or index.shape != target.shape[:axes] or axes <= (layout is Layout.SECOND):
            return NotImplemented
        if value.dim() > len(inside) or torch.broadcast_shapes(value.shape, inside) != inside:  # type: ignore[no-untyped-call]
            return NotImplemented
        chosen = index.reshape(*index.shape, *[1] * len(inside))
        target.copy_(torch.where(chosen, expanded(call, value, target.shape, layout), target))
        return None
    places = index if isinstance(index, tuple) else (index,)
    whole = slice(None)
    basic = all(type(p) in (int, slice) for p in places)  # a truth value would choose a copy, and not a view
    if layout is not Layout.ROWS or not basic or places[0] != whole:
        return NotImplemented
    view = target[places]  # the batch stays where it is
    if value.dim() > view.dim():
        return NotImplemented
    view.copy_(expanded(call, value, view.shape, layout))
    return None


@handles(_T.to, _T.type_as, structural=True)
def _typed(call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A parameter in the format of data, and on their device: nothing is taken of their values."""
    like = args[1] if len(args) > 1 else None
    if not call.is_root(args[0]) or not isinstance(like, Tensor):
        return NotImplemented
    return call.again(_T.to, args[0], like.device, like.dtype, *args[2:], **kwargs)
