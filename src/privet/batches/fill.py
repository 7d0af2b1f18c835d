"""Padding: a batch filled up with examples of zeros, so that every batch has one shape."""

from __future__ import annotations

from typing import Any

from privet.batches.count import each_of
from privet.batches.leaves import can_be_zero, described, joined, zeros
from privet.errors import ConfigurationError

__all__ = ["fill_rows"]


def fill_rows(batch: Any, size: int, *, examples: int) -> Any:
    """Returns a batch of `size` examples: the `examples` on axis 0 of every tensor, and zeros after them.

    What fills up holds no data, so that nothing but a constant could come of it if it were ever counted. In a packed
    sequence it is sequences of one zero element.

    Raises:
        ConfigurationError: if something in the batch is not of `examples` rows, or cannot be zero, with its path.
    """

    def filled(leaf: Any, path: str) -> Any:
        if not can_be_zero(leaf):
            raise ConfigurationError(
                f"{path} is {described(leaf)}, which cannot be filled up with rows of zeros. Expected tensors, or "
                "arrays of numbers. Build them in collate_fn, or train without padded=True."
            )
        return joined(leaf, zeros(leaf, size - examples, 0), 0)

    return each_of(batch, filled, examples=examples, doing="filled up with examples of zeros")
