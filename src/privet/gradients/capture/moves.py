"""What a function of torch moves: the axes along which a call takes or puts entries, by data or by place.

A row of the batch has a known example as long as it stays in its place. Indexing, sorting, splitting, joining and
products of data by data may move it. Which axis of a tensor is the batch is not known here: a `Move` says what was
moved, and how long the axes were. Those that are longer with more examples are found out elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Move", "masks_among", "move_of", "mover_of"]


class Move(NamedTuple):
    """One call of a function that moves entries."""

    sizes: tuple[int, ...]
    """The lengths of the axes along which entries are taken, or of all axes of what is put."""
    kind: Hashable
    """Which axes they are, and of how many: what tells this move from another one at the same place in the code."""
    static: Hashable = None
    """What makes the move the same on every batch where it is the same, such as the order of `flip`; or None."""
    by: tuple[Tensor | None, ...] = ()
    """For each of the sizes, the indices that entries are taken by: if they are 0, 1, 2, ..., nothing has moved."""
    into: tuple[int, ...] | None = None
    """The lengths of the axes of another tensor along which entries are put, or None if they are taken."""
    axes: tuple[int, ...] | None = None
    """Along which axes of the first argument entries are taken, or of all that are joined; None if it is not told."""
    rows: int | None = None
    """The length of axis 0, where entries are taken along it, or None."""


_Arguments = tuple[Any, ...]
_Mover = Callable[[_Arguments, Mapping[str, Any]], Move | None]


def _get(args: _Arguments, kwargs: Mapping[str, Any], place: int, *names: str, default: Any = None) -> Any:
    if place < len(args):
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _first(args: _Arguments, kwargs: Mapping[str, Any]) -> Any:
    return _get(args, kwargs, 0, "input", "self", "tensor", "tensors", "x", "data", "sequences")


def _taken(t: Tensor, axes: Sequence[int], **more: Any) -> Move:
    places = [axis % t.dim() for axis in axes] if t.dim() else []
    rows = t.shape[0] if 0 in places else None
    return Move(tuple(t.shape[axis] for axis in places), (t.dim(), *places), axes=tuple(places), rows=rows, **more)


# -- taken along an axis -----------------------------------------------------------------------------------------------


def _along(place: int, default: int | None, *, index: int | None = None) -> _Mover:
    """Returns the mover of a function with its axis at `place` of its arguments, `None` standing for all axes."""

    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        t, axis = _first(args, kwargs), _get(args, kwargs, place, "dim", "axis", "dimension", default=default)
        by = None if index is None else _get(args, kwargs, index, "index")
        return _taken(t, range(t.dim()) if axis is None else (axis,), by=() if by is None else (by,))

    return mover


def _fixed(axis: int | None) -> _Mover:
    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        t = _first(args, kwargs)
        return _taken(t, range(t.dim()) if axis is None else (axis,))

    return mover


def _indexed(t: Tensor, index: Any) -> tuple[list[int], list[Tensor | None]]:
    """Returns the axes along which `t[index]` does not take everything in its order, and the indices of each."""
    items = index if isinstance(index, tuple) else (index,)
    widths = [_width(item) for item in items]
    axes: list[int] = []
    by: list[Tensor | None] = []
    axis = 0
    for item, width in zip(items, widths, strict=True):
        if item is Ellipsis:
            axis += t.dim() - sum(widths)
            continue
        whole = width == 0 or (isinstance(item, slice) and item.indices(t.shape[axis]) == (0, t.shape[axis], 1))
        if not whole:
            axes += range(axis, axis + width)
            by += [item if isinstance(item, Tensor) and item.dtype != torch.bool else None] * width
        axis += width
    return axes, by


def _width(item: Any) -> int:
    """Returns how many axes one item of an index takes up."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Tensor | np.ndarray) and item.dtype in (torch.bool, torch.uint8, np.bool_):
        return item.ndim
    return 1


def _getitem(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    axes, by = _indexed(args[0], args[1])
    return _taken(args[0], axes, by=tuple(by)) if axes else None


def _where(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    return _taken(args[0], range(args[0].dim())) if len(args) + len(kwargs) == 1 else None


def _strided(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    t, size, stride = (_get(args, kwargs, i, name) for i, name in enumerate(("input", "size", "stride")))
    kept = 0
    while kept < min(t.dim(), len(size)) and (size[kept], stride[kept]) == (t.shape[kept], t.stride(kept)):
        kept += 1
    return _taken(t, range(kept, t.dim()))


def _table(place: int, *names: str) -> _Mover:
    """Returns the mover of a function that looks rows up in a table."""

    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        return _taken(_get(args, kwargs, place, *names), (0,))._replace(axes=())  # what is looked up stays in place

    return mover


def _padded(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    t, pad = _first(args, kwargs), _get(args, kwargs, 1, "pad")
    axes = [t.dim() - 1 - i // 2 for i, amount in enumerate(pad) if amount]
    return _taken(t, sorted(set(axes))) if axes else None


# -- moved in the same way on every batch ------------------------------------------------------------------------------


def _joined(default: int | None) -> _Mover:
    """Returns the mover of a function that joins whole tensors along an axis, or along a new one (`None`)."""

    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        tensors = _first(args, kwargs)
        count, axis = len(tensors), _get(args, kwargs, 1, "dim", "axis", default=default)
        if default is None:
            return Move((count,), (axis or 0,))
        axis = axis % tensors[0].dim() if tensors[0].dim() else 0
        total = sum(t.shape[axis] if t.dim() > axis else 1 for t in tensors)
        return Move((count, total), (axis,), static=count, axes=(axis,))

    return mover


def _stacked(axis: int) -> _Mover:
    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        tensors = _first(args, kwargs)
        total = sum(t.shape[axis] if t.dim() > axis else 1 for t in tensors)
        return Move((len(tensors), total), (axis,), static=len(tensors))

    return mover


def _turned(place: int, default: Any = None) -> _Mover:
    """Returns the mover of `flip`, `roll` and their like, with their axes at `place`."""

    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        t, dims = _first(args, kwargs), _get(args, kwargs, place, "dims", "dim", default=default)
        axes = (dims,) if isinstance(dims, int) else args[place:] if place < len(args) > place + 1 else dims
        return _taken(t, axes or range(t.dim()), static=repr(args[1:]) + repr(kwargs))

    return mover


def _along_some(place: int, default: Any) -> _Mover:
    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        t, dims = _first(args, kwargs), _get(args, kwargs, place, "dims", default=default)
        return _taken(t, range(t.dim()) if dims is None or dims == () else (dims,) if isinstance(dims, int) else dims)

    return mover


def _repeated(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    t, counts = _first(args, kwargs), _get(args, kwargs, 1, "repeats", "dims", "sizes", "repeat_times")
    counts = tuple(args[1:]) if isinstance(counts, int) else tuple(counts)
    lined_up = counts[max(len(counts) - t.dim(), 0) :]
    axes = [t.dim() - len(lined_up) + i for i, count in enumerate(lined_up) if count != 1]
    return _taken(t, axes, static=counts) if axes else None


def _interleaved(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    t, counts = _first(args, kwargs), _get(args, kwargs, 1, "repeats")
    axis = _get(args, kwargs, 2, "dim")
    return _taken(t, range(t.dim()) if axis is None else (axis,), static=counts if isinstance(counts, int) else None)


# -- products of data by data ------------------------------------------------------------------------------------------


def _product(place: int) -> _Mover:
    """Returns the mover of a product that sums over the last axis of its argument at `place`."""

    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
        t = _get(args, kwargs, place, "input", "self", "mat1", "batch1", "vec1", "mat")
        return _taken(t, (-1,))

    return mover


def _turned_product(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    return _taken(args[1], (-1,))


def _chain(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    tensors = args[0] if isinstance(args[0], (list, tuple)) else args
    return Move(tuple(t.shape[-1] for t in tensors[:-1]), len(tensors))


def _tensordot(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    t, dims = args[0], _get(args, kwargs, 2, "dims", default=2)
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    return _taken(t, range(t.dim() - dims, t.dim()) if isinstance(dims, int) else tuple(dims[0]))


def _attention(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    return _taken(_get(args, kwargs, 1, "key"), (-2,))


def _einsum(args: _Arguments, kwargs: Mapping[str, Any]) -> Move:
    equation, operands = args[0], args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    inputs, _, output = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, t in zip(inputs.split(","), operands, strict=True):
        front, _, back = term.partition("...")
        sizes.update(zip(front, t.shape, strict=False))
        sizes.update(zip(reversed(back), reversed(t.shape), strict=False))
    terms = inputs.split(",")
    met = {letter: sum(letter in term for term in terms) for letter in sizes}
    kept = output if "->" in equation else "".join(letter for letter in sizes if inputs.count(letter) == 1)
    gone = sorted(letter for letter in sizes if letter not in kept and met[letter] > 1)
    return Move(tuple(sizes[letter] for letter in gone), equation)


# -- put ---------------------------------------------------------------------------------------------------------------


def _put(value: Any, container: Tensor, axes: Sequence[int]) -> Move | None:
    if not isinstance(value, Tensor):
        return None
    into = tuple(container.shape[axis] for axis in axes)
    return Move(tuple(value.shape), (value.dim(), container.dim(), *axes), into=into)


def _setitem(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    axes, by = _indexed(args[0], args[1])
    move = _put(args[2], args[0], axes)
    if move is None or all(isinstance(each, Tensor) for each in by) or _is_mask(args[1]):
        return move
    return move._replace(into=())  # by place, in part or all of it: the rows keep their order


def _is_mask(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return any(isinstance(item, Tensor) and item.dtype == torch.bool for item in items)


def masks_among(func: Callable[..., Any], args: _Arguments) -> tuple[Tensor, ...]:
    """Returns the masks by which a call writes a parameter: a row that is written to keeps its example.

    What is written to is a row of the output at its own place, whatever made the mask: an example's gradient comes from
    its own rows alone. Whether a mask mixes examples is another question, which the checks of the outputs ask.
    """
    if func is not Tensor.__setitem__ or len(args) != 3:
        return ()
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    return tuple(item for item in items if isinstance(item, Tensor) and item.dtype == torch.bool)


def _index_put(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    t, indices, value = _first(args, kwargs), _get(args, kwargs, 1, "indices"), _get(args, kwargs, 2, "values")
    return _put(value, t, _indexed(t, tuple(slice(None) if i is None else i for i in indices))[0])


def _put_along(place: int) -> _Mover:
    """Returns the mover of `index_add` and `scatter`, whose value is at `place`."""

    def mover(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
        t, axis = _first(args, kwargs), _get(args, kwargs, 1, "dim")
        return _put(_get(args, kwargs, place, "source", "src", "values"), t, (axis % t.dim(),) if t.dim() else ())

    return mover


def _put_anywhere(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    t = _first(args, kwargs)
    return _put(_get(args, kwargs, 2, "source"), t, range(t.dim()))


def _put_by_place(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    return _put(_get(args, kwargs, 1, "src"), _first(args, kwargs), ())


# -- made of Python's values -------------------------------------------------------------------------------------------


def _made(args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    data = _first(args, kwargs)
    if isinstance(data, Tensor):
        return None
    shape = np.shape(data) if not isinstance(data, (list, tuple)) else torch.tensor(data).shape
    return Move(tuple(shape), len(shape))


_MOVERS: dict[str, _Mover] = {
    "__getitem__": _getitem,
    **dict.fromkeys(("index_select", "gather"), _along(1, 0, index=2)),
    "take_along_dim": _along(2, None),
    **dict.fromkeys(("take", "masked_select", "nonzero", "argwhere", "combinations", "cartesian_prod"), _fixed(None)),
    **dict.fromkeys(("unique", "unique_consecutive", "diag", "_pack_padded_sequence"), _fixed(None)),
    **dict.fromkeys(("vsplit", "msort", "flipud", "_pad_packed_sequence", "pad_sequence"), _fixed(0)),
    "hsplit": _along(9, 1),
    "dsplit": _along(9, 2),
    **dict.fromkeys(("narrow", "narrow_copy", "select", "select_copy"), _along(1, 0)),
    **dict.fromkeys(("unbind", "unbind_copy"), _along(1, 0)),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _along(2, 0)),
    **dict.fromkeys(("chunk", "unsafe_chunk", "tensor_split", "split_copy"), _along(2, 0)),
    **dict.fromkeys(("sort",), _along(1, -1)),
    **dict.fromkeys(("topk", "kthvalue"), _along(2, -1)),
    **dict.fromkeys(("diagonal", "as_strided_copy"), _fixed(None)),
    "where": _where,
    "unfold": _along(1, 0),
    "as_strided": _strided,
    **dict.fromkeys(("embedding", "embedding_bag"), _table(1, "weight")),
    "pad": _padded,
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined(0)),
    "stack": _joined(None),
    **dict.fromkeys(("vstack", "row_stack"), _stacked(0)),
    **dict.fromkeys(("hstack", "column_stack"), _stacked(1)),
    "dstack": _stacked(2),
    **dict.fromkeys(("flip", "fliplr"), _turned(1)),
    "roll": _along_some(2, None),  # by as many places as there are examples, it moves nothing in the first batch
    "rot90": _along_some(2, (0, 1)),
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _interleaved,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "__matmul__", "linear"), _product(0)),
    "__rmatmul__": _turned_product,
    **dict.fromkeys(("addmm", "addbmm", "baddbmm", "addmv"), _product(1)),
    **dict.fromkeys(("chain_matmul", "multi_dot", "linalg_multi_dot"), _chain),
    "tensordot": _tensordot,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "__setitem__": _setitem,
    "index_put": _index_put,
    **dict.fromkeys(("index_add", "index_copy", "index_reduce", "scatter", "scatter_add"), _put_along(3)),
    **dict.fromkeys(("scatter_reduce",), _put_along(3)),
    **dict.fromkeys(("masked_scatter", "put"), _put_anywhere),
    **dict.fromkeys(("slice_scatter", "select_scatter", "diagonal_scatter"), _put_by_place),
    **dict.fromkeys(("tensor", "as_tensor", "asarray", "from_numpy"), _made),
}


def mover_of(func: Callable[..., Any]) -> _Mover | None:
    """Returns what tells the moves of a function of torch, or None if it moves nothing."""
    name = getattr(func, "__name__", "").split(".")[0]
    found = _MOVERS.get(name)
    if found is None and not name.endswith("__"):
        found = _MOVERS.get(name.rstrip("_"))
    return found


def move_of(mover: _Mover, args: _Arguments, kwargs: Mapping[str, Any]) -> Move | None:
    """Returns what one call moves; where its arguments are not understood, a move of its own kind for every call."""
    try:
        return mover(args, kwargs)
    except Exception:  # noqa: BLE001 - torch itself will say what is wrong, or take it
        return Move((), ("not understood", object()))
