"""Functions that leave every row its place: what has R rows on axis 0 goes in, and has the same rows when it comes out.

A function that is not named here may do anything with rows, and nobody knows their owners after it. The shape of the
result is looked at as well: a name says what a function does along which axis, and no name says how tensors broadcast.

Axes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from privet.gradients.capture.call import tensors_among
from privet.gradients.capture.routing import Routed

__all__ = ["ALIKE", "FRESH", "Owners", "base_name", "kept", "named", "one_of"]

Owners = Callable[[object], Routed | None]
Found = list[tuple[Tensor, Routed]]

FRESH = frozenset(
    [
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
    ]
)
"""Functions that take no more of a tensor than its shape."""

ALIKE = frozenset({
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "truediv",
    "floordiv", "pow", "float_power", "remainder", "fmod", "mod", "neg", "negative", "abs", "absolute", "exp",
    "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "sigmoid", "tanh",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "atan2", "hypot", "erf",
    "erfc", "erfinv", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus",
    "softsign", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid", "hardshrink", "softshrink", "tanhshrink",
    "threshold", "rrelu", "prelu", "dropout", "alpha_dropout", "clamp", "clamp_min", "clamp_max", "clip", "where",
    "masked_fill", "lerp", "addcmul", "addcdiv", "maximum", "minimum", "fmax", "fmin", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "xor", "invert", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_not", "isnan", "isinf", "isfinite", "nan_to_num", "round", "floor", "ceil", "trunc",
    "sign", "sgn", "logaddexp", "logaddexp2", "xlogy", "to", "type", "type_as", "float", "double", "half",
    "bfloat16", "long", "int", "bool", "clone", "detach", "contiguous", "copy", "fill", "zero", "requires_grad",
})  # fmt: skip
"""Functions of each element alone."""

_ALONG: Mapping[str, tuple[int, Any]] = {
    **dict.fromkeys(
        [
            "sum",
            "nansum",
            "mean",
            "nanmean",
            "prod",
            "amax",
            "amin",
            "any",
            "all",
            "std",
            "var",
            "logsumexp",
            "count_nonzero",
        ],
        (1, None),
    ),
    **dict.fromkeys(
        ["max", "min", "argmax", "argmin", "median", "cumsum", "cumprod", "softmax", "log_softmax", "softmin"],
        (1, None),
    ),
    **dict.fromkeys(("sort", "argsort", "glu"), (1, -1)),
    **dict.fromkeys(("norm", "linalg_vector_norm", "vector_norm"), (2, None)),
    **dict.fromkeys(("topk", "kthvalue"), (2, -1)),
    "normalize": (2, 1),
    **dict.fromkeys(("index_select", "gather", "unbind", "narrow", "flip", "flatten"), (1, 0)),
    **dict.fromkeys(("chunk", "split", "tensor_split", "roll", "take_along_dim"), (2, 0)),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), (1, 0)),
}
"""Functions along some axes, with the place of the axes among the arguments and the axis by default."""

_SHAPED = frozenset(
    ["view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "squeeze", "unsqueeze"]
)
"""Functions that leave all elements in their order, and say anew where the axes are."""

_ROWS_FIRST = frozenset(
    [
        "linear",
        "layer_norm",
        "rms_norm",
        "embedding",
        "one_hot",
        "_grouped_mm",
        "grouped_mm",
        "grouped_mm_fallback",
        "expand",
        "expand_as",
        "broadcast_to",
    ]
)
"""Functions whose first argument has rows on axis 0, and whose result has them there."""

_PRODUCTS = frozenset(("matmul", "mm", "bmm"))


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, *names: str, default: Any = None) -> Any:
    """Returns an argument by its place or one of its names."""
    if place < len(args):
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def base_name(func: Callable[..., Any]) -> str:
    """Returns the name of a function of torch without what tells its forms apart: `add` for `__iadd__` and `add_`."""
    name: str = getattr(func, "__name__", "")
    name = name.split(".", maxsplit=1)[0]
    if name in {"__getitem__", "__setitem__", "__get__"} or name.startswith("_grouped"):
        return name
    name = name.strip("_")
    if name in ALIKE or not name or name[0] not in "ri":
        return name
    return name[1:] if name[1:] in ALIKE or name[1:] == "matmul" else name


def kept(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, of: Owners) -> Found | None:
    """Returns the tensors of a result with the owners of their rows, or None if these are not known.

    Args:
        name: of the function, as `base_name` says it.
        args: what it was given, of which some has owners.
        kwargs: what it was given by name.
        result: what it returned.
        of: returns the owners of a tensor's rows, if they are known.
    """
    results = list(tensors_among((result,)))
    if not results:
        return []
    found: Routed | None = None
    if name in ALIKE or (name in {"max", "min"} and isinstance(named(args, kwargs, 1, "other"), Tensor)):
        found = _alike(args, kwargs, result, of)
    elif name in _SHAPED and name != "flatten":
        found = _shaped(of(args[0]), result)
    elif name in _ROWS_FIRST:
        found = of(args[0]) if _has_rows_first(name, args, kwargs, result, of) else None
    elif name in _PRODUCTS:
        found = _product(args, result, of)
    elif name in {"transpose", "swapaxes", "swapdims", "permute"}:
        found = of(args[0]) if _leaves_first(name, args, kwargs) else None
    elif name == "__getitem__":
        found = of(args[0]) if _takes_all_rows(args[1], args[0]) else None
    elif name in {"cat", "concat", "concatenate"} and _axes(name, args, kwargs, _first(args, kwargs)[0].dim()) == {0}:
        found = _joined(_first(args, kwargs), of)
    elif name == "flatten" and not _axes_of_flatten(args, kwargs):
        found = _shaped(of(args[0]), result)
    elif name in _ALONG:
        found = _along(name, args, kwargs, of)
    if found is None or any(t.dim() == 0 or t.shape[0] != found.rows for t in results):
        return None
    return [(t, found) for t in results]


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return named(args, kwargs, 0, "tensors", "input", "self")


def _has_rows_first(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, of: Owners) -> bool:
    """Returns whether a function treats axis 0 of its first argument, and nothing else, as rows."""
    if not args or any(
        of(t) is not None and t.is_floating_point() for t in tensors_among((*args[1:], *kwargs.values()))
    ):
        return False
    t = args[0]
    if name.startswith(("expand", "broadcast")):
        return bool(result.dim() == t.dim())
    if name.endswith("_norm"):
        return bool(len(named(args, kwargs, 1, "normalized_shape")) < t.dim())
    return bool(t.dim() > 1) or name in {"embedding", "one_hot"}


def one_of(found: list[Routed]) -> Routed | None:
    """Returns owners on which all agree, if they do: those that know of a packing, or an origin, before others."""
    if not found or not all(map(found[0].same, found[1:])):
        return None
    return max(found, key=lambda each: (each.packing is not None, each.origin is not None))


def _alike(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, of: Owners) -> Routed | None:
    if not isinstance(result, Tensor):
        return None
    met = [(t, mine) for t in tensors_among((*args, *kwargs.values())) if (mine := of(t)) is not None]
    if any(t.dim() != result.dim() for t, _ in met):  # broadcast: axis 0 of it is another axis of the result
        return None
    return one_of([mine for _, mine in met])


def _shaped(mine: Routed | None, result: Any) -> Routed | None:
    """Returns the owners after a change of shape: rows are cut into as many each, or put together."""
    if mine is None or not isinstance(result, Tensor) or result.dim() == 0:
        return None
    rows, now = mine.rows, result.shape[0]
    if now == rows:
        return mine
    if rows and now > rows and now % rows == 0:
        return Routed(mine.owner.repeat_interleave(now // rows), origin=mine.origin)
    if now and rows % now == 0:
        groups = mine.owner.view(now, -1)
        if bool((groups == groups[:, :1]).all()):
            return Routed(groups[:, 0], origin=mine.origin)
    return None


def _product(args: tuple[Any, ...], result: Any, of: Owners) -> Routed | None:
    left, right = args[:2]
    a, b = of(left), of(right)
    if result.dim() != left.dim() and b is None:
        return None
    if b is None:  # rows of a matrix, or one matrix for each row
        return a if (left.dim() == 2 and right.dim() <= 2) or (left.dim() > 2 and right.dim() <= left.dim()) else None
    if right.dim() < 3 or result.dim() != right.dim():
        return None
    return one_of([a, b]) if a is not None and left.dim() == right.dim() else b if a is None else None


def _leaves_first(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name == "permute":
        dims = named(args, kwargs, 1, "dims")
        return bool((dims[0] if isinstance(dims, tuple | list) else dims) == 0)
    axes = named(args, kwargs, 1, "dim0", "axis0"), named(args, kwargs, 2, "dim1", "axis1")
    return all(axis is not None and axis % args[0].dim() != 0 for axis in axes)


def _takes_all_rows(index: Any, t: Tensor) -> bool:
    """Returns whether an index leaves axis 0 as it is, and in front."""
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, list) for item in items):
        return False
    first = items[0]
    whole = isinstance(first, slice) and first.indices(t.shape[0]) == (0, t.shape[0], 1)
    taken = sum(item is not None and item is not Ellipsis for item in items)
    ahead = first is Ellipsis and taken < t.dim()
    advanced = [item for item in items if isinstance(item, Tensor)]
    lone = len(advanced) <= 1 and not (advanced and any(isinstance(item, int) for item in items))
    return (whole or ahead) and lone


def _axes(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], dims: int) -> set[int] | None:
    """Returns the axes that a function goes along, or None for all."""
    place, default = _ALONG[name]
    axes = named(args, kwargs, place, "dim", "axis", "dims", default=default)
    if axes is None or axes in ((), []):
        return None
    new = dims + 1 if name == "stack" else dims
    return {int(axis) % new for axis in ((axes,) if isinstance(axes, int) else axes)}


def _axes_of_flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Returns whether `flatten` is told to begin behind axis 0, which is then left alone."""
    return bool(named(args, kwargs, 1, "start_dim", default=0))


def _along(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], of: Owners) -> Routed | None:
    first = _first(args, kwargs)
    tensors = list(tensors_among((first,)))
    found = [mine for t in tensors if (mine := of(t)) is not None]
    if not tensors or not found:
        return None
    if name == "flatten":
        return found[0]
    axes = _axes(name, args, kwargs, tensors[0].dim())
    return None if axes is None or 0 in axes else one_of(found)


def _joined(tensors: Any, of: Owners) -> Routed | None:
    owners = [of(t) for t in tensors]
    if not all(isinstance(mine, Routed) for mine in owners):
        return None
    return Routed(torch.cat([mine.owner for mine in owners if mine is not None]))
