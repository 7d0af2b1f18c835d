"""Physical batches: how large they may be, and how a batch is cut into them.

A batch is cut along the axes that count examples. In a batch of the private loader those are known: they are what grows
when one more example is collated. In a batch of the user's own they are axis 0 of every tensor, and anything else that
could hold examples is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from privet._checks import check_count
from privet.batches.structure import is_container, parts_of, places_in, rebuilt
from privet.errors import ConfigurationError, OutOfMemoryError
from privet.sampling.base import BatchTicket

__all__ = ["PhysicalSize", "cut_like", "cut_rows", "fill_rows", "tickets_of"]


class PhysicalSize:
    """The most examples that a physical batch may have: a given number, or the largest found to fit by halving.

    Args:
        name: of the option, for errors.
        size: a number of at least 1; `"auto"`; or None for logical batches in one piece.
    """

    def __init__(self, name: str, size: int | Literal["auto"] | None) -> None:
        self.auto = size == "auto"
        self.tried: list[int] = []  # sizes that did not fit
        if isinstance(size, str) and not self.auto:
            raise ConfigurationError(f"{name} must be a whole number of at least 1, or 'auto', got {size!r}.")
        self.most = None if size is None or self.auto else check_count(name, size, 1)

    def halve(self, failed: int, error: BaseException) -> None:
        """Takes note that a physical batch of `failed` examples did not fit.

        Raises:
            OutOfMemoryError: if it had one example or none, so that no smaller one is left to try.
        """
        self.tried.append(failed)
        if failed <= 1:
            raise OutOfMemoryError(
                f"out of memory with a physical batch of {failed}, after {', '.join(map(str, self.tried))} were tried. "
                "Expected a single example to fit. Use a smaller model or shorter inputs, recompute activations "
                f"(torch.utils.checkpoint), or a device with more memory. The last error was: {error}"
            ) from error
        self.most = failed // 2

    @staticmethod
    def free() -> None:
        """Hands memory that torch keeps for later back to the device, so that other sizes of blocks find room."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def tickets_of(ticket: BatchTicket, most: int) -> Iterator[tuple[int, int, BatchTicket]]:
    """Yields (start, stop, ticket) of the parts, of at most `most` examples, into which a batch is cut."""
    for start in range(0, ticket.size, most):
        stop = min(start + most, ticket.size)
        part = replace(
            ticket,
            size=stop - start,
            first=ticket.first and start == 0,
            last=ticket.last and stop == ticket.size,
        )
        yield start, stop, part


def cut_like(one: Any, two: Any, batch: Any, start: int, stop: int) -> Any:
    """Returns examples `start` to `stop` of a batch, given what batches of one example and of two look like.

    Raises:
        ConfigurationError: if the batch is built otherwise than those.
    """
    if isinstance(one, Tensor | np.ndarray) and isinstance(batch, Tensor | np.ndarray) and one.ndim == batch.ndim:
        grows = [axis for axis, (first, second) in enumerate(zip(one.shape, two.shape, strict=True)) if first != second]
        place = [slice(None)] * batch.ndim
        for axis in grows:
            place[axis] = slice(start * one.shape[axis], stop * one.shape[axis])
        return batch[tuple(place)] if grows else batch
    if is_container(one) and type(one) is type(batch):
        if len(parts_of(one)) != len(parts_of(two)):
            return type(batch)(parts_of(batch)[start * len(one) : stop * len(one)])
        if places_in(one) == places_in(batch):
            pieces = zip(parts_of(one), parts_of(two), parts_of(batch), strict=True)
            return rebuilt(batch, [cut_like(*piece, start, stop) for piece in pieces])
    elif not is_container(one) and type(one) is type(batch):
        return one * (stop - start) if isinstance(one, int) and one != two else batch
    raise ConfigurationError(
        f"a batch holds a {type(batch).__name__} where a batch of one example holds a {type(one).__name__}, so that it "
        "cannot be cut into smaller ones. Expected collate_fn to build all batches alike. Give a physical batch size "
        "that fits instead of 'auto'."
    )


def cut_rows(batch: Any, start: int, stop: int, *, examples: int) -> Any:
    """Returns rows `start` to `stop` of a batch whose every tensor has its `examples` on axis 0.

    Raises:
        ConfigurationError: if a tensor, array or list of values has another length, so that nobody knows whose it is.
    """
    return _by_rows(batch, lambda rows, where: rows[start:stop], examples=examples, where="the batch")


def fill_rows(batch: Any, size: int, *, examples: int) -> Any:
    """Returns a batch of `size` rows: the `examples` on axis 0 of every tensor, and rows of zeros after them.

    What fills up holds no data, so that nothing but a constant could come of it if it were ever counted.

    Raises:
        ConfigurationError: if something in the batch is not of `examples` rows, or cannot be zero.
    """

    def filled(rows: Any, where: str) -> Any:
        if isinstance(rows, Tensor):
            return torch.cat([rows, rows.new_zeros(size - examples, *rows.shape[1:])])
        if isinstance(rows, np.ndarray) and rows.dtype.kind in "biufc":
            return np.concatenate([rows, np.zeros_like(rows, shape=(size - examples, *rows.shape[1:]))])
        raise ConfigurationError(
            f"{where}, of {type(rows).__name__}, cannot be filled up with rows of zeros. Expected tensors, or arrays "
            "of numbers. Build them in collate_fn, or train without padded=True."
        )

    return _by_rows(batch, filled, examples=examples, where="the batch")


def _by_rows(batch: Any, change: Callable[[Any, str], Any], *, examples: int, where: str) -> Any:
    """Returns the batch with `change(rows, where they are)` in place of whatever has one row for each example."""
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim == 0:
            return batch
        if batch.shape[0] == examples:
            return change(batch, where)
        raise _unknown(f"{where}, of shape {tuple(batch.shape)},", examples)
    if not is_container(batch):
        return batch
    parts = parts_of(batch)
    if isinstance(batch, list | tuple) and not any(
        isinstance(p, Tensor | np.ndarray) or is_container(p) for p in parts
    ):
        if len(parts) == examples:
            return type(batch)(change(parts, where))
        raise _unknown(f"{where}, {len(parts)} values in a {type(batch).__name__},", examples)
    changed = [
        _by_rows(part, change, examples=examples, where=f"{where}[{place!r}]")
        for place, part in zip(places_in(batch), parts, strict=True)
    ]
    return rebuilt(batch, changed)


def _unknown(what: str, examples: int) -> ConfigurationError:
    return ConfigurationError(
        f"{what} is no part of a batch of {examples} examples that could be cut into physical ones. Expected the "
        "examples on axis 0 of every tensor, array and list. Keep what is not of examples in the loss or the model."
    )
