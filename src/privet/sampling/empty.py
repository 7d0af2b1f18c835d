"""The batch of no examples, with the structure of any other: what a model and a loss need when nobody was sampled.

It is found by collating one example, and the same example twice, and comparing the two (`privet.batches.empty`).
Contents of the example are never kept. What the comparison cannot tell is asked of `collate_fn([])`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from privet.batches.empty import UnknownLeafError, emptied, hollow
from privet.errors import ConfigurationError

__all__ = ["EmptyBatch"]


class EmptyBatch:
    """Makes empty batches of one dataset and collate function; found once, on first need or when asked.

    `example` is the index of the example whose structure is looked at.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], *, example: int = 0) -> None:
        self._dataset = dataset
        self._example = example
        self._collate_fn = collate_fn
        self._pair: tuple[Any, Any] | None = None

    def make(self) -> Any:
        """Returns a new empty batch."""
        one, two = self.structures()
        try:
            return emptied(one, two)
        except UnknownLeafError as unknown:
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
                    example = self._dataset[self._example]
                    pair = self._collate_fn([example]), self._collate_fn([example, example])
            except Exception as failure:
                raise ConfigurationError(
                    "A sampled batch can be empty, and its structure is read off the first example, but loading and "
                    f"collating that in the main process raised {type(failure).__name__}: {failure}"
                ) from failure
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)
            self._pair = hollow(pair[0]), hollow(pair[1])
        return self._pair
