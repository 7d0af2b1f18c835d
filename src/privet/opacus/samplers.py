"""Poisson sampling as torch samplers, at Opacus's names: drawn from a key, by the sampling that is billed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from privet.noise.key import NoiseKey
from privet.opacus.warning import warn
from privet.sampling.poisson import Poisson
from privet.sampling.sampler import LogicalBatches

__all__ = [
    "DistributedUniformWithReplacementSampler",
    "UniformWithReplacementSampler",
    "key_of",
    "steps_of",
]


def key_of(generator: torch.Generator | None, what: str) -> NoiseKey:
    """Returns a fresh key, or one that is read from a generator, with a warning."""
    if generator is None:
        return NoiseKey.fresh()
    warn(
        f"the {what} come from a torch.Generator: a person who knows its seed knows them, and the run is not private. "
        "Give no generator, except for tests."
    )
    return NoiseKey.from_generator(generator)


def steps_of(sample_rate: float) -> int:
    """Returns the steps of an epoch, 1 / sample_rate rounded down: 49 at 1 / 49, whatever its nearest float gives."""
    return max(1, math.floor(1.0 / sample_rate * (1.0 + 1e-12)))


class UniformWithReplacementSampler(Sampler[list[int]]):
    """Yields batches in which every example is with probability `sample_rate`, by a coin of its own.

    Args:
        num_samples: the number of examples.
        sample_rate: the probability.
        generator: makes the batches reproducible; by default they come from a key of the operating system, and follow
            no seed.
        steps: batches in a pass; by default 1 / sample_rate.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> None:
        if num_samples <= 0:
            raise ValueError(f"num_samples must be a whole number above 0, got {num_samples}.")
        self.num_samples = num_samples
        self.sample_rate = sample_rate
        self.generator = generator
        self.steps = steps_of(sample_rate) if steps is None else steps
        self.batches = self._drawn()

    def _drawn(self) -> LogicalBatches:
        return LogicalBatches(
            Poisson(min(1.0, self.sample_rate)),
            key=key_of(self.generator, "batches"),
            size=self.num_samples,
            steps=self.steps,
        )

    def __iter__(self) -> Iterator[list[int]]:
        number = self.batches.begin().number
        return (self.batches.examples(number, index) for index in range(self.steps))

    def __len__(self) -> int:
        return self.steps


class DistributedUniformWithReplacementSampler(Sampler[Tensor]):
    """Yields this process's share of Poisson batches: of its part of the data, each example with one probability.

    Every process has a part of its own of the shuffled data, the same all over an epoch. A share without examples is
    yielded like any other, so that all processes take the same number of steps.

    Args:
        total_size: the number of examples of all processes.
        sample_rate: the probability.
        shuffle: whether the parts are drawn anew every epoch (see `set_epoch`).
        shuffle_seed: what they are drawn from, the same on all processes. It decides who trains on which examples and
            protects nothing.
        steps: batches in a pass; by default 1 / sample_rate.
        generator: as in `UniformWithReplacementSampler`.
    """

    def __init__(
        self,
        *,
        total_size: int,
        sample_rate: float,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        steps: int | None = None,
        generator: Any = None,
    ) -> None:
        if total_size <= 0:
            raise ValueError(f"total_size must be a whole number above 0, got {total_size}.")
        self.num_replicas, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.total_size = total_size
        self.sample_rate = sample_rate
        self.generator = generator
        self.shuffle = shuffle
        self.shuffle_seed = shuffle_seed
        self.epoch = 0
        self.num_samples = len(range(self.rank, total_size, self.num_replicas))
        self.num_batches = steps_of(sample_rate) if steps is None else steps
        self._own = UniformWithReplacementSampler(
            num_samples=max(1, self.num_samples), sample_rate=sample_rate, generator=generator, steps=self.num_batches
        )

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.arange(self.total_size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
            order = torch.randperm(self.total_size, generator=generator)
        mine = order[self.rank :: self.num_replicas]
        for batch in self._own:
            yield mine[[index for index in batch if index < len(mine)]]

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Sets the number of the epoch, which the shuffling depends on."""
        self.epoch = epoch
