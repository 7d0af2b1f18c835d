"""What a container is: its parts, the name of each part, and the same container with other parts.

    container                                     parts                     rebuilt by
    list, tuple, deque, and their subclasses      elements                  the class, given the elements
    namedtuple                                    fields                    its `_make`
    dict and any other mapping                    values                    the class, given a dict
    mapping that is also a dataclass              values                    the class, given the values by name
    dataclass                                     fields                    `dataclasses.replace`
    class registered with torch's pytree          as it was registered      as it was registered

Anything else is a leaf. Two tuples of torch are leaves as well: a `torch.Size` is one value, and the tensors inside a
`PackedSequence` have no axis of examples of their own. So is a batch of graphs, whatever else its class is.

A registration comes before the other rows of the table, but for the exact types list, tuple and dict.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import SUPPORTED_NODES

from privet.batches.graphs import is_graphs
from privet.errors import ConfigurationError

__all__ = [
    "REGISTER",
    "Arguments",
    "context_of",
    "is_container",
    "parts_of",
    "parts_or_none",
    "rebuilt",
    "same_context",
    "steps_to",
]

REGISTER = (
    "Use tensors, and tuples, lists, dicts and dataclasses of them; or register the class with "
    "torch.utils._pytree.register_pytree_node."
)
"""What to do about a class whose parts are not known."""


class Arguments(NamedTuple):
    """The arguments of a call as one container, whose parts are the arguments: it is never a list of values itself."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Kind(NamedTuple):
    parts: Callable[[Any], Sequence[Any]]
    steps: Callable[[Any], Sequence[str]]
    rebuilt: Callable[[Any, Sequence[Any]], Any]


# -- one kind of container after the other -----------------------------------------------------------------------------


def _indices(value: Any) -> list[str]:
    return [f"[{index}]" for index in range(len(value))]


def _keys(value: Any) -> list[str]:
    return [f"[{key!r}]" for key in value]


def _mapping_of(value: Any, parts: Sequence[Any]) -> Any:
    made = dict(zip(value, parts, strict=True))
    cls: Any = type(value)
    # Hugging Face's ModelOutput is built by name: its fields that are None are not among its values.
    other = cls(**made) if dataclasses.is_dataclass(value) else cls(made)
    if list(other) != list(value) or any(a is not b for a, b in zip(other.values(), parts, strict=True)):
        raise TypeError("it does not keep the values that it is given")
    return other


def _fields(value: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(value)]


def _dataclass_of(value: Any, parts: Sequence[Any]) -> Any:
    given = {field.name for field in dataclasses.fields(value) if field.init}
    by_name = dict(zip(_fields(value), parts, strict=True))
    other = dataclasses.replace(value, **{name: part for name, part in by_name.items() if name in given})
    for name, part in by_name.items():
        # What `__post_init__` worked out of the new parts is right for them, unless it is itself made of examples.
        if name not in given and (part is not getattr(value, name) or not hasattr(other, name)):
            object.__setattr__(other, name, part)
    return other


def _registered(node: Any) -> _Kind:
    def steps(value: Any) -> list[str]:
        if node.flatten_with_keys_fn is not None:
            try:
                return [str(key) for key, _ in node.flatten_with_keys_fn(value)[0]]
            except (TypeError, ValueError):  # some libraries register a function that cannot be used
                pass
        return [f"[{index}]" for index in range(len(node.flatten_fn(value)[0]))]

    return _Kind(
        parts=lambda value: list(node.flatten_fn(value)[0]),
        steps=steps,
        rebuilt=lambda value, parts: node.unflatten_fn(list(parts), node.flatten_fn(value)[1]),
    )


_ELEMENTS = _Kind(lambda value: value, _indices, lambda value, parts: type(value)(parts))
_NAMED = _Kind(
    lambda value: value,
    lambda value: [f".{name}" for name in value._fields],
    lambda value, parts: type(value)._make(parts),
)
_DICT = _Kind(lambda value: list(value.values()), _keys, lambda value, parts: dict(zip(value, parts, strict=True)))
_MAPPING = _Kind(lambda value: list(value.values()), _keys, _mapping_of)
_DATACLASS = _Kind(
    lambda value: [getattr(value, name) for name in _fields(value)],
    lambda value: [f".{name}" for name in _fields(value)],
    _dataclass_of,
)
_ARGUMENTS = _Kind(
    lambda value: [*value.args, *value.kwargs.values()],
    lambda value: [*_indices(value.args), *_keys(value.kwargs)],
    lambda value, parts: Arguments(
        tuple(parts[: len(value.args)]), dict(zip(value.kwargs, parts[len(value.args) :], strict=True))
    ),
)
_EXACT: dict[type, _Kind] = {tuple: _ELEMENTS, list: _ELEMENTS, dict: _DICT, Arguments: _ARGUMENTS}
_NEVER = (Tensor, PackedSequence, type)
_LEAVES = frozenset({Tensor, torch.nn.Parameter, PackedSequence, torch.Size, str, int, float, bool, type(None)})


def _kind_of(value: Any) -> _Kind | None:
    """Returns how a container is taken apart, or None for a leaf."""
    cls = type(value)
    if (kind := _EXACT.get(cls)) is not None:
        return kind
    if cls in _LEAVES or isinstance(value, _NEVER):
        return None
    if is_graphs(value):
        return None
    if (node := SUPPORTED_NODES.get(cls)) is not None and cls is not deque:
        return _registered(node)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _NAMED
    if isinstance(value, list | tuple | deque):
        return _ELEMENTS
    if isinstance(value, Mapping):
        return _MAPPING
    return _DATACLASS if dataclasses.is_dataclass(value) else None


# -- any container -----------------------------------------------------------------------------------------------------


def is_container(value: Any) -> bool:
    """Returns whether a value has parts."""
    return _kind_of(value) is not None


def parts_or_none(value: Any) -> Sequence[Any] | None:
    """Returns the parts of a container in a fixed order, or None for a leaf."""
    kind = _kind_of(value)
    return None if kind is None else kind.parts(value)


def parts_of(value: Any) -> Sequence[Any]:
    """Returns the parts of a container in a fixed order."""
    parts = parts_or_none(value)
    assert parts is not None
    return parts


def steps_to(value: Any) -> Sequence[str]:
    """Returns how each part of a container is reached, `['x']`, `[0]` or `.x`, in the order of the parts."""
    kind = _kind_of(value)
    assert kind is not None
    return kind.steps(value)


def context_of(value: Any) -> Any:
    """Returns what a registered class keeps besides its parts; None for any other container."""
    cls = type(value)
    if cls in _EXACT or cls is deque or (node := SUPPORTED_NODES.get(cls)) is None:
        return None
    return node.flatten_fn(value)[1]


def same_context(one: Any, two: Any) -> bool:
    """Returns whether two containers keep the same besides their parts."""
    try:
        return bool(context_of(one) == context_of(two))
    except (RuntimeError, ValueError):  # tensors, say
        return False


def rebuilt(value: Any, parts: Sequence[Any], path: str = "the batch") -> Any:
    """Returns a container like `value` with other parts; `path` is where it stands, for the error.

    Raises:
        ConfigurationError: if its class cannot be built from them.
    """
    kind = _kind_of(value)
    assert kind is not None
    try:
        return kind.rebuilt(value, parts)
    except Exception as error:
        raise ConfigurationError(
            f"{path} is a {type(value).__name__}, which cannot be built again with other parts "
            f"({type(error).__name__}: {error}). {REGISTER}"
        ) from error
