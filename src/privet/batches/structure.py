"""Batches as containers of leaves: what collate functions make, taken apart and put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["is_container", "parts_of", "places_in", "rebuilt"]


def is_container(value: Any) -> bool:
    """Returns whether a value of a batch has parts: a mapping, list, tuple, namedtuple or dataclass."""
    return isinstance(value, Mapping | list | tuple) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    )


def places_in(value: Any) -> list[Any]:
    """Returns where the parts of a container are: keys, indices or names of fields."""
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, list | tuple):
        return list(range(len(value)))
    return [field.name for field in dataclasses.fields(value)]


def parts_of(value: Any) -> list[Any]:
    """Returns the parts of a container, in the order of `places_in`."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


def rebuilt(value: Any, parts: list[Any]) -> Any:
    """Returns a container like `value` with other parts."""
    if isinstance(value, Mapping):
        made = dict(zip(value, parts, strict=True))
        return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts)
    if isinstance(value, list | tuple):
        return type(value)(parts)
    names = places_in(value)
    return dataclasses.replace(value, **dict(zip(names, parts, strict=True)))
