"""Canaries: records added to a data set, and told again by their content wherever a model meets them.

A canary is a copy of a record whose first tensor was changed a little, so that no other record is the same. It goes
through the user's own loader, collate function and loop like every record. The model's inputs are then compared with
the canaries bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from privet.batches.tree import leaves_in, mapped, tensors_in
from privet.errors import ConfigurationError

__all__ = ["CanaryBook", "WithCanaries", "canaries_like", "marks_of"]

_ARRAYS = (Tensor, np.ndarray)


class WithCanaries(Dataset[Any]):
    """A data set with records of canaries behind its own.

    Args:
        dataset: any data set with a length.
        records: the canaries that are members.
    """

    def __init__(self, dataset: Any, records: Sequence[Any]) -> None:
        self.dataset = dataset
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.dataset) + len(self.records)

    def __getitem__(self, index: int) -> Any:
        own = len(self.dataset)
        return self.dataset[index] if index < own else self.records[index - own]


def canaries_like(dataset: Any, count: int, generator: torch.Generator) -> list[Any]:
    """Returns records like those of a data set, each with another first tensor than all others.

    Numbers with a fraction are moved by a thousandth of the tensor's size; whole numbers are exchanged with those of
    another record of the same shape, or permuted.

    Raises:
        ConfigurationError: if a record holds no tensor of at least 8 bytes, or canaries cannot be told apart.
    """
    members = len(dataset)
    if not members:
        raise ConfigurationError("the data set is empty. Expected records, for canaries are made like them.")
    sources = torch.randint(members, (count, 2), generator=generator).tolist()
    records = [_changed(dataset[a], dataset[b], generator) for a, b in sources]
    CanaryBook(records)  # raises if two are the same
    return records


def _changed(record: Any, other: Any, generator: torch.Generator) -> Any:
    first = _first_array(record)
    like = _first_array(other)
    done = False

    def change(leaf: Any, path: str) -> Any:
        nonlocal done
        if done or leaf is not first:
            return leaf
        done = True
        values = torch.as_tensor(leaf)
        new = _moved(values, torch.as_tensor(like), generator)
        return new if isinstance(leaf, Tensor) else new.numpy()

    return mapped(record, change, "the record", afresh=True)


def _moved(values: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    if values.is_floating_point():
        noise = torch.randn(values.shape, generator=generator)
        size = float(values.double().abs().max()) or 1.0
        return (values.double() + 1e-3 * size * noise.double()).to(values.dtype)
    if values.shape == other.shape and not torch.equal(values, other):
        chosen = torch.rand(values.shape, generator=generator) < 0.5
        return torch.where(chosen, other, values)
    return values.flatten()[torch.randperm(values.numel(), generator=generator)].view(values.shape)


def _first_array(record: Any) -> Any:
    for leaf in leaves_in(record):
        if isinstance(leaf, _ARRAYS) and int(np.prod(leaf.shape)) > 0:
            return leaf
    raise ConfigurationError(
        f"a record is {type(record).__name__} and holds no tensor or array. Expected records with one, whose content "
        "reaches the model as it is."
    )


class CanaryBook:
    """Tells canaries by the content of their first tensor.

    Args:
        records: the canaries, members or not.
    """

    def __init__(self, records: Sequence[Any]) -> None:
        firsts = [torch.as_tensor(_first_array(record)) for record in records]
        if len({(t.dtype, t.shape) for t in firsts}) > 1:
            raise ConfigurationError("canaries differ in type or shape. Expected records of one type and shape.")
        self.count = len(records)
        self._dtype, self._shape = firsts[0].dtype, firsts[0].shape
        marks = _marks(torch.stack(firsts))
        self._marks, self._places = marks.sort()
        if bool((self._marks[1:] == self._marks[:-1]).any()):
            raise ConfigurationError(
                f"two of {self.count} canaries are the same. Expected records with enough content to tell them apart; "
                "ask for fewer canaries, or give the records more content."
            )

    def places(self, inputs: Any) -> Tensor | None:  # (B,)
        """Returns which canary each row of a model's inputs is, -1 where it is none; None if no input is like them."""
        for leaf in tensors_in(inputs):
            if leaf.dim() == len(self._shape) + 1 and leaf.shape[1:] == self._shape and leaf.dtype == self._dtype:
                with torch.no_grad():
                    return self._found(_marks(leaf.detach()))
        return None

    def _found(self, marks: Tensor) -> Tensor:
        known, places = self._marks.to(marks.device), self._places.to(marks.device)
        at = torch.searchsorted(known, marks).clamp_(max=self.count - 1)
        return torch.where(known[at] == marks, places[at], -1)


def marks_of(records: Sequence[Any]) -> list[int]:
    """Returns a number for the content of each record's first tensor."""
    firsts = (torch.as_tensor(_first_array(record)) for record in records)
    return [int(_marks(first[None])) for first in firsts]


def _marks(rows: Tensor) -> Tensor:  # (B, ...) -> (B,)
    """Returns a number for the bits of each row: a sum of whole numbers, and so exact on every machine."""
    flat = rows.reshape(rows.shape[0], -1).contiguous()
    octets = (flat if flat.dtype == torch.bool else flat.view(torch.uint8)).to(torch.int64)
    # Multipliers without pattern, the same everywhere (as splitmix64 makes them); products wrap around, as they should.
    factors = torch.arange(1, octets.shape[1] + 1, dtype=torch.int64, device=octets.device) * 0x1E3779B97F4A7C15
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        factors = (factors ^ ((factors >> 30) & 0x3FFFFFFFF)) * multiplier
    return (octets * (factors | 1)).sum(1)
