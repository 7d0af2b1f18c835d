"""The batches of a private loader as transformers' Trainer wants them: read ahead, skipped, and counted in parts.

The Trainer reads all parts of a step before it trains on the first, and rebuilds a loader from its dataset and its
batch sampler when a run is resumed in the middle of an epoch. So its loader is over a dataset of batches, whose
sampler hands out places only, and a part is announced when it is trained on and not when it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, final

from torch.utils.data import DataLoader, Dataset, Sampler

from privet.errors import ProtocolError
from privet.sampling import BatchTicket, PrivateLoader

__all__ = ["ReadAhead", "loader_of"]


@final
class ReadAhead(Dataset[Any]):
    """The parts of the batches of one pass after the other; its length is the number of examples.

    Args:
        loader: the private loader, which hands each logical batch over in parts.
    """

    def __init__(self, loader: PrivateLoader) -> None:
        self.loader = loader
        self._pass: Iterator[tuple[BatchTicket, Any]] | None = None
        self._read: deque[tuple[BatchTicket, Any]] = deque()  # and not trained on yet

    def __len__(self) -> int:
        return self.loader.dataset_size

    def begin(self) -> None:
        """Begins a pass. What was read of the one before, and not trained on, is forgotten."""
        self._read.clear()
        self._pass = self.loader.drawn()

    def __getitem__(self, place: int) -> Any:
        """Returns the next part of the pass, whatever its place."""
        assert self._pass is not None
        ticket, batch = next(self._pass)
        self._read.append((ticket, batch))
        return batch

    def announce(self) -> BatchTicket:
        """Announces the part that was read first, which is trained on now, and returns its ticket.

        Raises:
            ProtocolError: if none was read.
        """
        if not self._read:
            raise ProtocolError(
                "a training step was taken on a batch that the private loader did not hand over. Expected one step for "
                "each of its batches. Leave the training loop, and get_train_dataloader, to PrivateTrainer."
            )
        ticket, batch = self._read.popleft()
        self.loader.announce(ticket, batch)
        return ticket


@final
class _Places(Sampler[list[int]]):
    """The places of the parts in a pass, one by one. Each iteration begins a pass."""

    def __init__(self, batches: ReadAhead) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches.loader)

    def __iter__(self) -> Iterator[list[int]]:
        self._batches.begin()
        for place in range(len(self)):
            yield [place]


def _only(batches: list[Any]) -> Any:
    """Returns the one batch of a list."""
    (batch,) = batches
    return batch


def loader_of(batches: ReadAhead) -> DataLoader[Any]:
    """Returns the loader that the Trainer goes through."""
    return DataLoader(batches, batch_sampler=_Places(batches), collate_fn=_only)
