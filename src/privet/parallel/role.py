"""The role of the ranks that train together, and the process that trains alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, final

import torch.distributed as dist
from torch import Tensor, nn

from privet.accounting.event import Event
from privet.accounting.role import LedgerLike
from privet.errors import ConfigurationError
from privet.gradients.spread import HERE, Spread
from privet.noise import NoiseMechanism
from privet.noise.key import NoiseKey
from privet.sampling.base import BatchTicket
from privet.sampling.share import WHOLE, Share

__all__ = ["Alone", "Due", "Ranks", "fitting"]


def fitting(parameter: Tensor, value: Tensor) -> Tensor:
    """Returns a whole gradient in the parameter's shape."""
    return value if value.shape == parameter.shape else value.view_as(parameter)


@dataclass(frozen=True)
class Due:
    """What one rank is about to release.

    Attributes:
        ticket: of the batch, if it is a whole, fresh batch of a private loader.
        step: the number of the logical step.
        words: says what is released, in words that are the same on every rank.
    """

    ticket: BatchTicket | None
    step: int
    words: Callable[[], str]


class Ranks(Protocol):
    """All that training asks of the ranks that it runs on. Each method is called by all ranks, in the same order."""

    @property
    def first(self) -> bool:
        """Returns whether this is rank 0, which writes the ledger and checkpoints."""

    @property
    def share(self) -> Share:
        """Returns the part of each logical batch that this rank takes."""

    @property
    def found(self) -> str:
        """Returns what was found, in words."""

    @property
    def spread(self) -> Spread:
        """Returns how the model is spread over the ranks, for its forwards and sums."""

    def beside(self, other: Ranks) -> Ranks:
        """Returns the ranks of another model that is trained through the same door, with the ledger of these."""

    def together(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context on one rank an error on all. Nothing inside may talk to other ranks."""

    def telling(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context an error of the other ranks too, at their next `agreed`."""

    def running(self) -> AbstractContextManager[None]:
        """Does the same where models run. Others that wait inside of a forward hear of it once this process ends."""

    def compare(self, facts: Mapping[str, object]) -> None:
        """Raises RanksError on every rank if the facts are not the same on all of them."""

    def begin(self, module: nn.Module) -> None:
        """Puts the wrapper of the module to rest, and gives all ranks the parameters and buffers of rank 0."""

    def key(self, key: NoiseKey) -> NoiseKey:
        """Returns the one key of all ranks: the reproducible one that each has, or one that rank 0 has sent."""

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism whose release is of the sum over all ranks."""

    def gradient(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Returns a value, as the mechanism released it, as a gradient that fits the parameter."""

    def ledger(self, ledger: LedgerLike) -> LedgerLike:
        """Returns the ledger of rank 0, or on other ranks its mirror."""

    def agreed(self, due: Callable[[], Due]) -> BatchTicket | None:
        """Returns the ticket of the step that all ranks are about to take, or None if none of them has one.

        Raises:
            RanksError: if another rank failed, or is about to take another step. What `due` raises is raised here.
        """

    def written(self, write: Callable[[], Sequence[Event]], ledger: LedgerLike) -> None:
        """Calls `write`, which returns the events that it wrote. All ranks return after rank 0 wrote, or raise."""


@final
class Alone:
    """A process that trains by itself."""

    first: bool = True
    share: Share = WHOLE
    found: str = "one process"
    spread: Spread = HERE

    def beside(self, other: Ranks) -> Ranks:
        """Returns this process."""
        return self

    def together(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def telling(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def running(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def compare(self, facts: Mapping[str, object]) -> None:
        """Does nothing."""

    def begin(self, module: nn.Module) -> None:
        """Does nothing."""

    def key(self, key: NoiseKey) -> NoiseKey:
        """Returns the key."""
        return key

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism."""
        return mechanism

    def gradient(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Returns the value in the parameter's shape."""
        return fitting(parameter, value)

    def ledger(self, ledger: LedgerLike) -> LedgerLike:
        """Returns the ledger."""
        return ledger

    def agreed(self, due: Callable[[], Due]) -> BatchTicket | None:
        """Returns the ticket.

        Raises:
            ConfigurationError: if there are other ranks by now.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigurationError(
                f"this process is one of {dist.get_world_size()} of a process group that was initialized after its "
                "training became private: each of them would bill itself alone. Expected init_process_group before "
                "make_private or PrivateStep. Start the script again in that order."
            )
        return due().ticket

    def written(self, write: Callable[[], Sequence[Event]], ledger: LedgerLike) -> None:
        """Calls `write`."""
        write()
