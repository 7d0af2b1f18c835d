"""The Poisson loader at Opacus's name: torch's loader outside, the core's private loader inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from privet.opacus.empty_batch import CollateFnWithEmpty, wrap_collate_with_empty
from privet.opacus.samplers import (
    DistributedUniformWithReplacementSampler,
    UniformWithReplacementSampler,
)
from privet.opacus.warning import warn
from privet.sampling.loader import PrivateLoader

__all__ = ["CollateFnWithEmpty", "DPDataLoader", "private_part", "switch_generator", "wrap_collate_with_empty"]

_OPTIONS = (
    *("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"),
    *("prefetch_factor", "persistent_workers"),
)


class DPDataLoader(DataLoader[Any]):
    """A loader whose batches have each example with probability `sample_rate`, and may be empty.

    Batches are drawn and announced by the core's private loader (`private`). An empty batch has the structure of any
    other from the first on.

    Args:
        dataset: a map-style dataset.
        sample_rate: the probability.
        collate_fn: as in torch's DataLoader.
        drop_last: has no meaning here, and is ignored.
        generator: makes the batches reproducible. By default they follow no seed.
        distributed: whether every process draws from a part of the data of its own.
        batch_first: kept for scripts that give it: the batch axis is read off the batches.
        rand_on_empty: ignored with a warning: an empty batch has no examples, and the private module knows what to do.
        **kwargs: of torch's DataLoader, those that do not change what is drawn.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        sample_rate: float,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        collate = default_collate if collate_fn is None else collate_fn
        self.sample_rate = sample_rate
        self.distributed = distributed
        if rand_on_empty:
            warn("rand_on_empty would train on a made-up example. An empty batch is left empty: its gradient is zero.")
        self._share: DistributedUniformWithReplacementSampler | None = None
        self.private: PrivateLoader | None = None
        sampler: Any
        if distributed:
            sampler = self._share = DistributedUniformWithReplacementSampler(
                total_size=len(dataset), sample_rate=sample_rate, generator=generator
            )
            collate = wrap_collate_with_empty(collate_fn=collate, batch_first=batch_first)
        else:
            sampler = UniformWithReplacementSampler(
                num_samples=len(dataset), sample_rate=sample_rate, generator=generator
            )
            self.private = PrivateLoader(
                dataset,
                batches=sampler.batches,
                expected_batch_size=sample_rate * len(dataset),
                dataset_size=len(dataset),
                collate_fn=collate,
                options={key: value for key, value in kwargs.items() if value is not None},
            )
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, generator=generator, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return super().__iter__() if self.private is None else iter(self.private)

    @classmethod
    def from_data_loader(
        cls,
        data_loader: DataLoader[Any],
        *,
        distributed: bool = False,
        generator: torch.Generator | None = None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> DPDataLoader:
        """Returns a Poisson loader with the options of another, at rate 1 / len(data_loader).

        Raises:
            ValueError: for an iterable dataset, from which nothing can be drawn at random.
        """
        if isinstance(data_loader.dataset, IterableDataset):
            raise ValueError(  # noqa: TRY004 - Opacus raises it
                "Uniform sampling is not supported for IterableDataset: no example of a stream can be drawn at random. "
                "Use a map-style dataset, with __len__ and __getitem__."
            )
        _tell_of_sampler(data_loader)
        collate: Any = data_loader.collate_fn
        return cls(
            data_loader.dataset,
            sample_rate=1.0 / len(data_loader),
            collate_fn=getattr(collate, "collate_fn", collate) if isinstance(data_loader, PrivateLoader) else collate,
            generator=generator if generator is not None else data_loader.generator,
            distributed=distributed,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
            **{name: getattr(data_loader, name) for name in _OPTIONS},
        )


def _tell_of_sampler(loader: DataLoader[Any]) -> None:
    sampler: Any = loader.sampler
    if isinstance(loader, DPDataLoader | PrivateLoader) or type(sampler) in (SequentialSampler, RandomSampler):
        return
    warn(
        f"{type(sampler).__name__} is not used: under Poisson sampling every example has the same chance in each batch."
    )


def private_part(loader: object) -> PrivateLoader | None:
    """Returns the core's private loader that hands over the batches of a loader, or None if none does."""
    if isinstance(loader, PrivateLoader):
        return loader
    found = getattr(loader, "private", None)
    return found if isinstance(found, PrivateLoader) else None


def switch_generator(*, data_loader: DataLoader[Any], generator: Any) -> DataLoader[Any]:
    """Returns the same loader with another source of randomness; the sampler of the old one follows it, too.

    Raises:
        ValueError: for a loader that forms no batches, or whose sampler draws nothing.
    """
    sampler: Any = data_loader.batch_sampler
    if isinstance(data_loader, DPDataLoader):
        return DPDataLoader.from_data_loader(data_loader, distributed=data_loader.distributed, generator=generator)
    if isinstance(sampler, BatchSampler):
        if not hasattr(sampler.sampler, "generator"):
            raise ValueError("the sampler of this loader has no generator: there is nothing to switch.")
        sampler.sampler.generator = generator
    elif isinstance(sampler, UniformWithReplacementSampler | DistributedUniformWithReplacementSampler):
        kind, options = type(sampler), dict(vars(sampler))
        sampler = _redrawn(kind, options, generator)
    else:
        raise ValueError("Non-batch processing is not supported: expected a loader that forms batches.")  # noqa: TRY004
    return DataLoader(
        data_loader.dataset,
        batch_sampler=sampler,
        collate_fn=data_loader.collate_fn,
        generator=generator,
        **{name: getattr(data_loader, name) for name in _OPTIONS},
    )


def _redrawn(kind: type[Any], options: Mapping[str, Any], generator: Any) -> Any:
    """Returns the sampler anew, drawn from a generator."""
    if kind is UniformWithReplacementSampler:
        names = {"num_samples": "num_samples", "sample_rate": "sample_rate", "steps": "steps"}
    else:
        names = {name: name for name in ("total_size", "sample_rate", "shuffle", "shuffle_seed")}
        names["steps"] = "num_batches"
    return kind(**{name: options[source] for name, source in names.items()}, generator=generator)
