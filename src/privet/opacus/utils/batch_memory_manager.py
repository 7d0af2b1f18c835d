"""Physical batches at Opacus's names: a logical batch in parts that fit, of which the last one's step releases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from privet.opacus.data_loader import private_part
from privet.opacus.optimizers import DPOptimizer
from privet.sampling.loader import PrivateLoader

__all__ = ["BatchMemoryManager", "BatchSplittingSampler", "wrap_data_loader"]


class BatchSplittingSampler(Sampler[list[int]]):
    """Yields the batches of a sampler in parts, and tells the optimizer which of their steps release.

    Args:
        sampler: yields the logical batches.
        max_batch_size: the most examples of a part.
        optimizer: is told to skip all steps but that of each batch's last part.
    """

    def __init__(self, *, sampler: Any, max_batch_size: int, optimizer: DPOptimizer) -> None:
        self.sampler = sampler
        self.max_batch_size = max_batch_size
        self.optimizer = optimizer

    def __iter__(self) -> Iterator[list[int]]:
        for drawn in self.sampler:
            batch = drawn.tolist() if hasattr(drawn, "tolist") else list(drawn)
            for start in range(0, max(len(batch), 1), self.max_batch_size):
                stop = start + self.max_batch_size
                self.optimizer.signal_skip_step(do_skip=stop < len(batch))
                yield batch[start:stop]

    def __len__(self) -> int:
        if isinstance(self.sampler, BatchSampler):
            size: float = self.sampler.batch_size
        elif hasattr(self.sampler, "sample_rate"):
            size = self.sampler.sample_rate * self.sampler.num_samples
        else:
            return len(self.sampler)
        return math.ceil(len(self.sampler) * size / self.max_batch_size)


class _Parts(DataLoader[Any]):
    """The batches of a private loader in parts, each announced just before it is handed over.

    Unlike a sampler that is read ahead by workers, the optimizer hears of a part when the loop gets it.
    """

    def __init__(self, loader: DataLoader[Any], private: PrivateLoader, most: int, optimizer: DPOptimizer) -> None:
        super().__init__(loader.dataset, batch_size=max(1, most))
        self._private = private
        self._most = most
        self._optimizer = optimizer
        self._batches = len(loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for ticket, batch in self._private.drawn(lambda: self._most):
            self._private.announce(ticket, batch)
            self._optimizer.signal_skip_step(do_skip=not ticket.last)
            yield batch

    def __len__(self) -> int:
        return math.ceil(self._batches * self._private.expected_batch_size / self._most)


def wrap_data_loader(*, data_loader: DataLoader[Any], max_batch_size: int, optimizer: DPOptimizer) -> DataLoader[Any]:
    """Returns a loader of the same batches in parts of at most `max_batch_size` examples."""
    private = private_part(data_loader)
    if private is not None:
        return _Parts(data_loader, private, max_batch_size, optimizer)
    return DataLoader(
        data_loader.dataset,
        batch_sampler=BatchSplittingSampler(
            sampler=data_loader.batch_sampler, max_batch_size=max_batch_size, optimizer=optimizer
        ),
        num_workers=data_loader.num_workers,
        collate_fn=data_loader.collate_fn,
        pin_memory=data_loader.pin_memory,
        timeout=data_loader.timeout,
        worker_init_fn=data_loader.worker_init_fn,
        multiprocessing_context=data_loader.multiprocessing_context,
        generator=data_loader.generator,
        prefetch_factor=data_loader.prefetch_factor,
        persistent_workers=data_loader.persistent_workers,
    )


class BatchMemoryManager:
    """Gives the batches of a loader in parts that fit into memory; noise is added once for each logical batch.

    Args:
        data_loader: the loader that make_private returned.
        max_physical_batch_size: the most examples of a part.
        optimizer: the optimizer that make_private returned. Call its `step` and `zero_grad` on each part.
    """

    def __init__(self, *, data_loader: DataLoader[Any], max_physical_batch_size: int, optimizer: DPOptimizer) -> None:
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.max_physical_batch_size = max_physical_batch_size

    def __enter__(self) -> DataLoader[Any]:
        return wrap_data_loader(
            data_loader=self.data_loader, max_batch_size=self.max_physical_batch_size, optimizer=self.optimizer
        )

    def __exit__(self, *error: object) -> None:
        pass
