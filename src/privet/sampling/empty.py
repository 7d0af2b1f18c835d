"""The batch of no examples, with the structure of any other: what a model and a loss need when nobody was sampled.

It is found by collating one example, and the same example twice: an axis, a list or a count that doubles is the one
that counts examples, wherever it stands, and is cut to nothing. What does not change keeps its shape, with the values
of tensors set to zero. Contents of the example are never kept.

    leaf                              becomes
    tensor, array                     0 along each axis that doubles; zeros of the same shape if none does
    list or tuple that doubles        the empty one
    list, tuple, namedtuple, mapping  itself, each part treated alike
    dataclass                         itself, each field treated alike
    whole number that doubles         0
    number, string, None otherwise    itself if it does not depend on the number of examples
    anything else                     what `collate_fn([])` gives; an error if that fails
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privet.batches.structure import is_container, parts_of, places_in, rebuilt
from privet.errors import ConfigurationError

__all__ = ["EmptyBatch"]


class EmptyBatch:
    """Makes empty batches of one dataset and collate function; found once, on first need or when asked."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
        self._dataset = dataset
        self._collate_fn = collate_fn
        self._pair: tuple[Any, Any] | None = None

    def make(self) -> Any:
        """Returns a new empty batch."""
        one, two = self.structures()
        try:
            return _emptied(one, two, "the batch")
        except _UnknownLeafError as unknown:
            try:
                return self._collate_fn([])
            except Exception as failure:
                raise ConfigurationError(
                    f"A sampled batch can be empty, and {unknown} cannot be cut to no examples: collate into tensors, "
                    "arrays, strings, or lists, tuples, mappings and dataclasses of those, or let "
                    f"collate_fn([]) return the empty batch (it raised {type(failure).__name__}: {failure})."
                ) from failure

    def structures(self) -> tuple[Any, Any]:
        """Returns what a batch of one example looks like, and one of two, without their contents."""
        if self._pair is None:
            numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - what users seed
            try:
                with torch.random.fork_rng(devices=[]):  # an augmentation must not notice that it was asked once more
                    example = self._dataset[0]
                    pair = self._collate_fn([example]), self._collate_fn([example, example])
            except Exception as failure:
                raise ConfigurationError(
                    "A sampled batch can be empty, and its structure is read off the first example, but loading and "
                    f"collating that in the main process raised {type(failure).__name__}: {failure}"
                ) from failure
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)
            self._pair = _hollow(pair[0]), _hollow(pair[1])
        return self._pair


class _UnknownLeafError(Exception):
    """A leaf whose examples cannot be counted."""


def _hollow(value: Any) -> Any:
    """Returns the structure with every tensor and array replaced by zeros: no content of an example is kept."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value, requires_grad=False)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return np.zeros_like(value)
    return rebuilt(value, [_hollow(part) for part in parts_of(value)]) if is_container(value) else value


def _emptied(one: Any, two: Any, where: str) -> Any:
    """Returns the empty batch of two structures, of one example and of two."""
    if type(one) is not type(two):
        raise _UnknownLeafError(f"{where}, a {type(one).__name__} that becomes a {type(two).__name__}")
    if isinstance(one, Tensor):
        shape = _emptied_shape(one.shape, two.shape, where)
        return torch.zeros(shape, dtype=one.dtype, device=one.device)
    if isinstance(one, np.ndarray) and one.dtype != object:
        return np.zeros(_emptied_shape(one.shape, two.shape, where), dtype=one.dtype)
    if is_container(one):
        if len(parts_of(one)) != len(parts_of(two)):
            if isinstance(one, list | tuple) and len(two) == 2 * len(one):
                return type(one)()
            raise _UnknownLeafError(f"{where}, a {type(one).__name__} of varying length")
        parts = [
            _emptied(first, second, f"{where}[{place!r}]")
            for place, first, second in zip(places_in(one), parts_of(one), parts_of(two), strict=True)
        ]
        return rebuilt(one, parts)
    if isinstance(one, int) and not isinstance(one, bool) and two == 2 * one:
        return 0
    if one is None or (isinstance(one, bool | int | float | complex | str | bytes) and one == two):
        return one
    raise _UnknownLeafError(f"{where}, a {type(one).__name__},")


def _emptied_shape(one: Sequence[int], two: Sequence[int], where: str) -> list[int]:
    if len(one) != len(two) or any(second not in (first, 2 * first) for first, second in zip(one, two, strict=False)):
        raise _UnknownLeafError(f"{where}, of shape {tuple(one)} for one example and {tuple(two)} for two,")
    return [first if first == second else 0 for first, second in zip(one, two, strict=True)]
