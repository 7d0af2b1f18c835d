"""Noise as a function of (key, step, parameter name, index): what every addressed source shares.

Guarantees
----------
Element j of a parameter gets one and the same value whatever the order, chunking or sharding of the calls; a shard
gives the index of its first element as `offset`. Elements 2b and 2b+1 come from block b, the first its cosine, the
second its sine.

    input                                 result
    std = 0                               `add_` leaves every bit as it was; nothing is drawn
    std NaN, infinite or negative         refused
    dtype below float32, complex, int     refused: noise is never drawn or added in half precision
    an empty tensor                       nothing happens
    any memory layout                     the index is the row-major one of the tensor's shape
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from privet._checks import check_at_least, check_count
from privet.errors import ConfigurationError
from privet.noise.key import NoiseKey

__all__ = ["CounterNoise", "Offsets", "Piece", "Span", "add_drawn", "parts_of", "span_of"]

_ACCUMULATORS = (torch.float32, torch.float64)
_LAST_INDEX = 2**63


class Piece(NamedTuple):
    """Consecutive elements of a parameter within the shard of it that a process holds."""

    start: int  # of its first element, in the shard, in row-major order
    offset: int  # of its first element, in the parameter
    size: int


Offsets = Mapping[str, int | Sequence[Piece]]
"""Where shards lie: by name, the index of the first element, or the pieces that make up the shard, in order."""


class Span(NamedTuple):
    """A run of elements of one parameter, and where their noise goes."""

    target: Tensor  # a view of the tensor, any shape
    name: str
    offset: int  # index of its first element within the parameter
    size: int
    blocks: int  # how many blocks of two elements the run touches


def span_of(target: Tensor, name: str, offset: int, size: int) -> Span:
    """Returns the run of `size` elements from index `offset` on."""
    return Span(target, name, offset, size, (offset + size + 1) // 2 - offset // 2)


class CounterNoise(ABC):
    """A noise source that draws from a counter. A subclass adds to spans; all else is done here, once."""

    def __init__(self, key: NoiseKey, *, purpose: str = "noise") -> None:
        key.claim(purpose)
        self._key = key

    @property
    @abstractmethod
    def secure(self) -> bool:
        """Returns whether the values are cryptographically unpredictable to who does not hold the key."""

    @property
    @abstractmethod
    def _longest(self) -> int:
        """Returns how many elements that are consecutive in memory it takes at once."""

    @abstractmethod
    def _add(self, spans: Iterable[Span], *, step: int, std: float) -> None:
        """Adds N(0, std**2), where `std` is above 0, to the target of every span."""

    @final
    @property
    def key(self) -> NoiseKey:
        """Returns the key, which shows nothing of its secret."""
        return self._key

    @final
    @property
    def predictable(self) -> bool:
        """Returns whether the run is reproducible, and so not private."""
        return self._key.predictable

    @final
    def add_(self, out: Tensor, *, std: float, name: str, step: int, offset: int = 0) -> Tensor:
        """Returns `out`, to which N(0, std**2) was added: the elements of `name` from index `offset` on."""
        self.add_many([(name, out)], std=std, step=step, offsets={name: offset})
        return out

    @final
    def fill_(self, out: Tensor, *, std: float, name: str, step: int, offset: int = 0) -> Tensor:
        """Returns `out`, overwritten with N(0, std**2): the elements of `name` from index `offset` on."""
        self.fill_many([(name, out)], std=std, step=step, offsets={name: offset})
        return out

    @final
    def add_many(
        self, tensors: Iterable[tuple[str, Tensor]], *, std: float, step: int, offsets: Offsets | None = None
    ) -> None:
        """Adds N(0, std**2) to every tensor, each named; small ones share their arithmetic. Equal to `add_` of each."""
        std, spans = self._prepared(tensors, std=std, step=step, offsets=offsets)
        if std > 0.0:
            self._add(spans, step=step, std=std)

    @final
    def fill_many(
        self, tensors: Iterable[tuple[str, Tensor]], *, std: float, step: int, offsets: Offsets | None = None
    ) -> None:
        """Overwrites every tensor, each named, with N(0, std**2). Equal to `fill_` of each."""
        std, spans = self._prepared(tensors, std=std, step=step, offsets=offsets)
        for span in spans:
            span.target.zero_()
        if std > 0.0:
            self._add(spans, step=step, std=std)

    @final
    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: never the key, only the fingerprint of a reproducible one."""
        return {"fingerprint": self._key.fingerprint(), "secure": self.secure}

    @final
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes: draws a fresh key, unless the run is reproducible, whose key must be the one of the state."""
        found = self._key.fingerprint()
        if state["fingerprint"] != found:
            raise ConfigurationError(
                "The state was saved by a run with "
                + ("another noise_generator" if state["fingerprint"] and found else "a different kind of key")
                + ": a reproducible run resumes with a generator seeded as the first was, any other without one."
            )
        self._key.renew()

    def _prepared(
        self, tensors: Iterable[tuple[str, Tensor]], *, std: float, step: int, offsets: Offsets | None
    ) -> tuple[float, list[Span]]:
        """Returns the checked std and the spans, checked before the first tensor is touched."""
        check_count("step", step)
        spans: list[Span] = []
        seen = set()
        for name, tensor in tensors:
            if tensor.dtype not in _ACCUMULATORS:
                raise ConfigurationError(
                    f"Noise for {name!r} must be added to float32 or float64, got {tensor.dtype}: "
                    "accumulate the clipped sum in float32, and round after the noise."
                )
            if name in seen:
                raise ConfigurationError(f"{name!r} is named twice: both tensors would get the same noise.")
            seen.add(name)
            for part, offset in parts_of(tensor.detach(), name, (offsets or {}).get(name, 0)):
                check_count(f"offset of {name!r}", offset)
                if offset + part.numel() > _LAST_INDEX:
                    raise ConfigurationError(f"{name!r} reaches beyond index 2**63; give the offset of its shard.")
                spans += _chunks(part, name, offset, self._longest)
        return check_at_least("std", std), spans


def add_drawn(spans: Iterable[Span], normals: Callable[[list[Span]], Tensor], *, together: int) -> None:
    """Adds to every span the values that `normals` returns for all blocks of a group of spans, in their order.

    Args:
        spans: to be added to.
        normals: its result is valid until the next call.
        together: about how many values a group has.
    """
    for group in _grouped(spans, together):
        values, start = normals(group), 0
        for span in group:
            first = start + span.offset % 2
            added = values[first : first + span.size]
            if added.device != span.target.device:
                added = added.to(span.target.device)
            span.target.add_(added if span.target.dim() == 1 else added.view(span.target.shape))
            start += 2 * span.blocks


def parts_of(tensor: Tensor, name: str, where: int | Sequence[Piece]) -> Iterator[tuple[Tensor, int]]:
    """Yields the parts of a shard whose elements are consecutive in the parameter, each with its first index there.

    Raises:
        ConfigurationError: if the pieces are not all of the shard, in order, each of elements behind the one before:
            an element would get no noise, or two elements the same.
    """
    if isinstance(where, int):
        yield tensor, where
        return
    start, least = 0, 0
    for piece in where:
        if piece.start != start or piece.size < 1 or piece.offset < least:
            raise ConfigurationError(
                f"a shard of {name!r} is given by {piece}, after {start} elements that reach to index {least}. "
                "Expected pieces of the shard in order, which do not overlap in the parameter."
            )
        start, least = start + piece.size, piece.offset + piece.size
    if start != tensor.numel():
        raise ConfigurationError(
            f"a shard of {name!r} has {tensor.numel()} elements, and its pieces {start}. Expected pieces that make up "
            "the shard."
        )
    flat = tensor if len(where) == 1 else tensor.reshape(-1)
    if flat.numel() and flat.data_ptr() != tensor.data_ptr():  # a copy: noise added to it would be lost
        raise ConfigurationError(f"a shard of {name!r} is not contiguous. Expected one that is.")
    for piece in where:
        yield (flat if len(where) == 1 else flat[piece.start : piece.start + piece.size]), piece.offset


def _chunks(tensor: Tensor, name: str, offset: int, longest: int) -> Iterator[Span]:
    """Yields the tensor as runs of at most `longest` elements that are consecutive in row-major order."""
    count = tensor.numel()
    if count == 0:
        return
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        if count <= longest:
            yield span_of(flat, name, offset, count)
            return
        for start in range(0, count, longest):
            part = flat[start : start + longest]
            yield span_of(part, name, offset + start, part.numel())
    elif count <= longest:
        yield span_of(tensor, name, offset, count)
    else:
        rows = tensor.shape[0]
        inner = count // rows
        taken = max(1, longest // inner)
        for start in range(0, rows, taken):
            part = tensor[start : start + taken] if inner <= longest else tensor[start]
            yield from _chunks(part, name, offset + start * inner, longest)


def _kind(span: Span) -> tuple[torch.device, torch.dtype]:
    return span.target.device, span.target.dtype


def _grouped(spans: Iterable[Span], together: int) -> Iterator[list[Span]]:
    """Yields the spans in groups of one device and type that have about so many values."""
    group: list[Span] = []
    size = 0
    for span in spans:
        grown = size + 2 * span.blocks
        if group and (grown > together + 2 or _kind(span) != _kind(group[0])):
            yield group
            group, grown = [], 2 * span.blocks
        group.append(span)
        size = grown
    if group:
        yield group
