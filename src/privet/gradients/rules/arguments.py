"""The arguments of a captured call by name, however the user wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

__all__ = ["named"]


def named(args: Sequence[Any], kwargs: Mapping[str, Any], /, **defaults: Any) -> SimpleNamespace | None:
    """Returns the arguments by name, or None if there is one that is not among `defaults`.

    Args:
        args: the positional ones. Torch has checked them against the function's own signature before.
        kwargs: those given by name.
        **defaults: every argument in the function's own order, with its default.
    """
    names = list(defaults)
    if len(args) > len(names) or not defaults.keys() >= kwargs.keys():
        return None
    return SimpleNamespace(**{**defaults, **dict(zip(names, args, strict=False)), **kwargs})
