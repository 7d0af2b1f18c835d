"""Data whose rows hold several examples, as far as the names of what makes them show it."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from privet.errors import ConfigurationError

__all__ = ["refuse_mixed_records"]

_MIXING = ("mixup", "cutmix", "mosaic", "copypaste")
_MOST = 500  # objects that are looked at


def refuse_mixed_records(dataset: Any, collate_fn: Any) -> None:
    """Raises if a dataset or a collate function is, or holds, one that mixes examples, by the name of its class.

    Torchvision's `MixUp` and `CutMix`, timm's `Mixup` and functions named so are found, also inside of partial
    functions, closures, compositions and subsets. What mixes examples under another name goes unseen.
    """
    for what, start in (("collate_fn", collate_fn), ("the dataset", dataset)):
        for thing in _within(start):
            kind = thing if isinstance(thing, type) or hasattr(thing, "__name__") else type(thing)
            name = getattr(kind, "__name__", "")
            if any(word in name.lower().replace("_", "") for word in _MIXING):
                raise ConfigurationError(
                    f"{what} has a {name}, which puts parts of several examples into one row: one example is then in "
                    "several rows, each of which is clipped by itself, and moves the sum by more than the clip norm. "
                    "Expected rows of one example each. Leave it away, or mix each example with public data only."
                )


def _within(start: Any) -> Iterator[Any]:
    """Yields an object, and what its attributes, parts and closures hold."""
    seen: set[int] = set()
    queue = deque([start])
    while queue and len(seen) < _MOST:
        thing = queue.popleft()
        if thing is None or id(thing) in seen or isinstance(thing, Tensor | np.ndarray | str | bytes | int | float):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, list | tuple | set):
            queue.extend(thing if len(thing) <= _MOST else ())
        elif isinstance(thing, dict):
            queue.extend(thing.values() if len(thing) <= _MOST else ())
        elif isinstance(thing, functools.partial):
            queue.extend((thing.func, thing.args, thing.keywords))
        else:
            cells = getattr(thing, "__closure__", None) or ()
            queue.extend(cell.cell_contents for cell in cells if _filled(cell))
            queue.append(getattr(thing, "__self__", None))
            if not isinstance(thing, type) and not callable(getattr(thing, "__code__", None)):
                queue.append(getattr(thing, "__dict__", None))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # nothing was assigned yet
        return False
