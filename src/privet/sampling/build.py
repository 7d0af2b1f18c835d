"""Private loaders from a user's own DataLoader, or from a dataset; and the refusal of loaders without a known law.

option of the loader                    here
collate_fn, num_workers, pin_memory,    kept
timeout, worker_init_fn, generator,
prefetch_factor, persistent_workers,
multiprocessing_context
batch_size                              the expected size under Poisson sampling; the exact one in a partition
drop_last                               kept in a partition; under Poisson sampling no batch is left over to drop
shuffle                                 implied by Poisson sampling; kept in a partition, drawn from the key
sampler, batch_sampler of one's own     refused: their batches have no known law, so no honest epsilon
IterableDataset                         read in order under sampling=Stream(...); refused under any other
batch_size=None                         refused: there is no batch to sample
in_order=False                          refused: batches would overtake the tickets that announce them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from privet._checks import check_count
from privet.errors import ConfigurationError
from privet.noise.key import NoiseKey
from privet.sampling.base import Planned, Sampling, SpentOnce
from privet.sampling.loader import PrivateLoader
from privet.sampling.partition import Partition
from privet.sampling.poisson import Poisson
from privet.sampling.reading import in_order
from privet.sampling.sampler import LogicalBatches
from privet.sampling.shards import ShardedDataset, share_of
from privet.sampling.share import WHOLE, Share
from privet.sampling.stream import Stream
from privet.sampling.users import Users, UsersRecords

__all__ = ["loader_for", "privatize_loader"]


def privatize_loader(
    loader: DataLoader[Any],
    *,
    poisson: bool = True,
    sampling: Sampling | None = None,
    key: NoiseKey | None = None,
    dataset_size: int | None = None,
    share: Share = WHOLE,
    accumulate: int = 1,
    users: Users | None = None,
) -> PrivateLoader:
    """Returns a private loader with the options of the user's own.

    Args:
        loader: a sequential or shuffling loader of a map-style dataset.
        poisson: whether batches are drawn afresh at rate batch_size / n. If not, the loader's own order is kept,
            sequential or shuffled, without amplification.
        sampling: a sampling in place of these two, such as one of the user's own.
        key: what batches are drawn from; by default a fresh one.
        dataset_size: a public number in place of the dataset's length, which then stays secret and may differ by one.
        share: the part of each batch that the loader hands over, where several ranks train together.
        accumulate: how many of the user's batches make a logical one, which is handed over in as many parts.
        users: whose records are whose, where users are drawn: then sizes and rates count users.

    Raises:
        ConfigurationError: for a loader whose batches have no known law, or for options that contradict each other.
    """
    if isinstance(loader, PrivateLoader):
        raise ConfigurationError("This loader is private already: pass the loader that it was made from.")
    if not isinstance(loader, DataLoader):
        raise ConfigurationError(f"data_loader must be a torch DataLoader, got {type(loader).__name__}.")
    shuffled = _order(loader, poisson=poisson, stream=isinstance(sampling, Stream))
    if not getattr(loader, "in_order", True):  # torch 2.6 has no other order
        raise ConfigurationError("in_order=False lets batches overtake each other: use in_order=True, torch's default.")
    dataset = in_order(loader.dataset, sampling, workers=loader.num_workers, share=share)
    size, records = _units(dataset, users, sampling, share)
    if sampling is not None and not poisson:
        raise ConfigurationError("sampling= and poisson_sampling=False both say how batches are formed: give one.")
    if dataset_size is not None and not (poisson if sampling is None else sampling.random_size):
        raise ConfigurationError(
            "dataset_size= hides the number of examples by one, and in a partition one example more moves all those "
            "after it to other batches, as it takes a place in batches of fixed size, which the accounting does not "
            "cover. Expected Poisson sampling with it. Leave dataset_size away, or sample with poisson_sampling=True."
        )
    declared = size if dataset_size is None else check_count("dataset_size", dataset_size, least=1)
    physical, whose = check_count("batch_size", loader.batch_size, least=1), f"batch_size={loader.batch_size}"
    batch_size = physical * check_count("accumulate", accumulate, least=1)
    if accumulate > 1:
        whose += f" and accumulate={accumulate}"
    # A pass has as many batches as the public number says: -(-n // b) is exact where ceil(1 / rate) might round.
    expected: float = batch_size
    steps = -(-declared // batch_size)
    if sampling is not None:
        expected, steps = sampling.expected_batch_size(declared), sampling.steps_per_pass(declared)
        if abs(expected - batch_size) > max(0.5, 0.01 * expected):
            raise ConfigurationError(
                f"the loader has {whose}, and {sampling} draws {expected:g} of {declared} examples on "
                "average. Expected the same number, which the noisy sum is divided by. Change one of the two."
            )
    elif poisson:
        sampling = Poisson.of(batch_size, declared)
    else:
        sampling = Partition(shuffled=shuffled, batch_size=batch_size, drop_last=loader.drop_last)
        steps = sampling.steps_per_pass(size)
    options = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        **({"pin_memory_device": loader.pin_memory_device} if loader.pin_memory_device else {}),
    }
    batches = LogicalBatches(
        sampling,
        key=key or NoiseKey.fresh(),
        size=size,
        steps=steps,
        share=share_of(dataset, share),
        parts=accumulate,
        users=records,
    )
    return PrivateLoader(
        dataset,
        batches=batches,
        expected_batch_size=expected,
        dataset_size=declared,
        collate_fn=loader.collate_fn,
        options=options,
    )


def loader_for(
    dataset: Any,
    *,
    sampling: Sampling,
    key: NoiseKey | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    drop_last: bool = False,
    share: Share = WHOLE,
    users: Users | None = None,
) -> PrivateLoader:
    """Returns a private loader of a dataset.

    Args:
        dataset: a map-style dataset.
        sampling: how batches are formed.
        key: what they are drawn from; by default a fresh one.
        batch_size: of a partition that does not say its own. Poisson sampling has its rate.
        steps: the number of batches in a pass where steps are billed one by one; by default ceil(1 / rate).
        collate_fn: as in torch's DataLoader.
        num_workers: as in torch's DataLoader.
        drop_last: of a partition that does not say its own.
        share: the part of each batch that the loader hands over, where several ranks train together.
        users: whose records are whose, where users are drawn: then sizes and rates count users.

    Raises:
        ConfigurationError: for options that contradict the sampling.
    """
    dataset = in_order(dataset, sampling, workers=num_workers, share=share)
    size, records = _units(dataset, users, sampling, share)
    if isinstance(sampling, Partition) and (batch_size is not None or drop_last):
        if sampling.batch_size not in (None, batch_size):
            raise ConfigurationError(f"batch_size is {batch_size}, and {sampling} has its own: give one of the two.")
        sampling = replace(sampling, batch_size=batch_size, drop_last=drop_last or sampling.drop_last)
    elif batch_size is not None or drop_last:
        raise ConfigurationError("Poisson sampling has a rate and no batch_size, nor a last batch to drop.")
    if steps is not None and sampling.billed_per == "pass":
        raise ConfigurationError(
            f"{sampling} is billed by the pass, and its steps follow from its size. Leave steps= away."
        )
    batches = LogicalBatches(
        sampling,
        key=key or NoiseKey.fresh(),
        size=size,
        steps=sampling.steps_per_pass(size) if steps is None else check_count("steps", steps, least=1),
        share=share_of(dataset, share),
        users=records,
    )
    return PrivateLoader(
        dataset,
        batches=batches,
        expected_batch_size=sampling.expected_batch_size(size),
        dataset_size=size,
        collate_fn=collate_fn or default_collate,
        options={"num_workers": num_workers},
    )


def _units(
    dataset: Any, users: Users | None, sampling: Sampling | None, share: Share
) -> tuple[int, UsersRecords | None]:
    """Returns how many units of privacy there are to draw from, examples or users, and the records of the users."""
    size = _length(dataset)
    if users is None:
        return size, None
    given: object = users
    if not isinstance(given, Users):
        raise ConfigurationError(f"users must be a description, Users(ids, most=k), got {type(users).__name__}.")
    if isinstance(sampling, Planned | SpentOnce):
        raise ConfigurationError(
            f"users= was given with {type(sampling).__name__}, which reads records one by one in an order of its own. "
            "Expected a sampling that can draw users, such as Poisson, and a data set of which any record can be read. "
            "Leave users= away, or change the sampling."
        )
    if share.together or (share.ranks > 1 and isinstance(dataset, ShardedDataset)):
        raise ConfigurationError(
            "users= was given on ranks that hold parts of one model, or that read shards of their own. Expected each "
            "user's records on one rank, with the whole model there. Train with DistributedDataParallel, over a "
            "dataset that every rank can read."
        )
    records = UsersRecords(users, size)
    return len(records), records


def _length(dataset: Any) -> int:
    """Returns the number of examples, read once and thereby public."""
    if isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            f"{type(dataset).__name__} is an IterableDataset, from which no example can be drawn at random, so that "
            "nothing is known of who is in a batch. Read it in order, with sampling=Stream(batch_size=..., "
            "records=...), or use a map-style dataset, with __len__ and __getitem__: for example list(dataset), or an "
            "index over your shards."
        )
    try:
        size = len(dataset)
    except TypeError as failure:
        raise ConfigurationError(
            f"{type(dataset).__name__} has no length, and the sampling rate is batch_size / length: give it a __len__."
        ) from failure
    if size == 0:
        raise ConfigurationError("The dataset is empty: there is nobody to sample.")
    return size


def _order(loader: DataLoader[Any], *, poisson: bool, stream: bool) -> bool:
    """Returns whether the user's loader shuffles, and refuses one whose batches have no known law."""
    iterable = isinstance(loader.dataset, IterableDataset)
    if iterable and not stream:
        _length(loader.dataset)
    if type(loader).__module__.startswith("accelerate."):
        raise ConfigurationError(
            f"this {type(loader).__name__} was prepared by accelerate before, and what it yields is not what was "
            "sampled. Expected the loader that was given to accelerator.prepare. Leave the loader out of that call, "
            "and give it to privet.integrations.accelerate.prepare."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigurationError(
            f"{type(loader).__name__} overrides DataLoader.__iter__, so what it yields is not what was sampled: "
            "pass a plain torch DataLoader, with the change made in collate_fn."
        )
    if loader.batch_sampler is None:
        raise ConfigurationError(
            "batch_size=None turns batching off, so there is no batch to sample: give the loader a batch_size."
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ConfigurationError(
            f"The batch_sampler {type(loader.batch_sampler).__name__} forms batches by a law of its own, whose privacy "
            "is not known: give the loader batch_size= instead, and the batches are drawn for you."
        )
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    if iterable:  # torch lets no sampler stand beside one
        return False
    if type(sampler) is SequentialSampler and sampler.data_source is dataset:
        return False
    if stream:
        raise ConfigurationError(
            f"the loader chooses examples by {type(sampler).__name__}, and a Stream is read in its own order. Expected "
            "neither shuffle=True nor a sampler. Remove it; shuffle the records once, before the run, if need be."
        )
    if type(sampler) is RandomSampler and sampler.data_source is dataset:
        if not sampler.replacement and sampler.num_samples == _length(dataset):
            return True
        found = "RandomSampler with replacement or num_samples"
    else:
        found = type(sampler).__name__
    law = "joins every batch with the same probability" if poisson else "is met at most once in a pass"
    raise ConfigurationError(
        f"The sampler {found} chooses examples by a law of its own; the accounting needs one under which each "
        f"example {law}. Remove sampler=, and use shuffle=True or False. Weigh the examples in the loss instead."
    )
