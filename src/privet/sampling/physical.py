"""Physical batches: how large they may be, and which part of a logical batch each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from privet._checks import check_count
from privet.errors import ConfigurationError, OutOfMemoryError
from privet.sampling.base import BatchTicket

__all__ = ["PhysicalSize", "begin_of", "stop_of", "tickets_of"]


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
    start = 0
    while start < ticket.size:
        stop = stop_of(start, ticket.size, most=most, owner=ticket.owner)
        part = replace(
            ticket,
            size=stop - start,
            first=ticket.first and start == 0,
            last=ticket.last and stop == ticket.size,
            owner=None if ticket.owner is None else ticket.owner[start:stop] - ticket.owner[start],
        )
        yield start, stop, part
        start = stop


def begin_of(cut: int, owner: npt.NDArray[np.int64] | None) -> int:  # (R,), ascending
    """Returns the place of the first record of the user whose records a cut would part; the cut itself without users.

    The records of a user are clipped together, and so are in one physical batch.
    """
    return cut if owner is None or cut >= len(owner) else int(np.searchsorted(owner, owner[cut]))


def stop_of(start: int, size: int, *, most: int, owner: npt.NDArray[np.int64] | None = None) -> int:
    """Returns where the physical batch ends that begins at `start`: it has at most `most` examples of `size`.

    Raises:
        ConfigurationError: if a user has more records in the batch than that.
    """
    stop = begin_of(min(start + most, size), owner)
    if stop <= start < size:
        raise ConfigurationError(
            f"a user has more records in the batch than a physical batch of {most} takes, and they are clipped "
            "together. Expected physical batches that hold at least the contribution bound of Users(most=...)."
        )
    return stop
