"""Empty batches for a collate function that knows none: with the structure of the first batch that it made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["CollateFnWithEmpty", "wrap_collate_with_empty"]

logger = logging.getLogger("privet.opacus.data_loader")


class CollateFnWithEmpty:
    """Collates examples, and makes of no examples an empty batch that looks like the first batch.

    `DPDataLoader` does not need it: it reads the structure off the dataset before the first batch.

    Args:
        collator_fn: the collate function, or None for lists of examples.
        batch_first: whether the batch is on axis 0 of each tensor, else on axis 1.
        rand_on_empty: whether an empty batch has one made-up example of random zeros and ones instead of none.
        sample_empty_shapes: shapes of the tensors of a batch that is empty before any other was made.
        dtypes: their types.
    """

    def __init__(
        self,
        collator_fn: Callable[[list[Any]], Any] | None,
        batch_first: bool = True,  # noqa: FBT001, FBT002 - Opacus's signature
        rand_on_empty: bool = False,  # noqa: FBT001, FBT002
        sample_empty_shapes: Sequence[tuple[int, ...]] | None = None,
        dtypes: Sequence[Any] | None = None,
    ) -> None:
        self.wrapped_collator_fn = collator_fn
        self.batch_first = batch_first
        self.rand_on_empty = rand_on_empty
        self.sample_empty_shapes = sample_empty_shapes
        self.dtypes = dtypes
        self._structure: Any = None

    def __call__(self, batch: list[Any]) -> Any:
        """Returns the collated batch. Raises TypeError where an empty one has parts that are no tensors."""
        if batch:
            made = batch if self.wrapped_collator_fn is None else self.wrapped_collator_fn(batch)
            if self._structure is None:
                self._structure = _without_data(made)
            return made
        if self._structure is not None:
            return self._empty(self._structure)
        logger.warning("First batch is empty. What a batch looks like is not known yet: this one is a plain list.")
        if self.sample_empty_shapes is None or self.dtypes is None:
            return []
        return [torch.zeros(s, dtype=t) for s, t in zip(self.sample_empty_shapes, self.dtypes, strict=True)]

    def _empty(self, like: Any) -> Any:
        if torch.is_tensor(like):
            shape = list(like.shape)
            shape[0 if self.batch_first else 1] = 1 if self.rand_on_empty else 0
            made = torch.empty(shape, dtype=like.dtype, device=like.device)
            return made.copy_(torch.randint(0, 2, shape)) if self.rand_on_empty else made
        if isinstance(like, Mapping):
            return {key: self._empty(value) for key, value in like.items()}
        if isinstance(like, list | tuple):
            return type(like)([self._empty(value) for value in like])
        raise TypeError(
            f"Unsupported batch type: {type(like).__name__}. An empty batch of it cannot be made, and one with data "
            "would break the guarantee. Collate into tensors, or mappings, lists and tuples of them."
        )


def _without_data(batch: Any) -> Any:
    """Returns the structure of a batch, its tensors on one value each, so that nothing of the examples is kept."""
    if torch.is_tensor(batch):
        return torch.zeros(1, dtype=batch.dtype, device=batch.device).expand(batch.shape)
    if isinstance(batch, Mapping):
        return {key: _without_data(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)([_without_data(value) for value in batch])
    return batch


def wrap_collate_with_empty(
    *,
    collate_fn: Callable[[list[Any]], Any] | None,
    batch_first: bool = True,
    rand_on_empty: bool = False,
    sample_empty_shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[Any] | None = None,
) -> CollateFnWithEmpty:
    """Returns the collate function as one that knows empty batches."""
    return CollateFnWithEmpty(collate_fn, batch_first, rand_on_empty, sample_empty_shapes, dtypes)
