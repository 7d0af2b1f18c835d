"""The ranks of one process group, whatever each holds of the model: what they agree on, one key, and one ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, final

from torch import Tensor, nn

from privet.accounting.event import Event
from privet.accounting.role import LedgerLike
from privet.gradients.spread import Spread
from privet.noise import NoiseMechanism
from privet.noise.key import NoiseKey
from privet.parallel.agreement import Agreement
from privet.parallel.mirror import Bookkeeping
from privet.parallel.role import Due, Ranks
from privet.sampling.base import BatchTicket
from privet.sampling.share import Share

__all__ = ["Holding", "Joined"]


class Holding(Protocol):
    """What each rank holds of one model: all of it, or shards."""

    @property
    def spread(self) -> Spread:
        """Returns how forwards and sums see it."""

    @property
    def place(self) -> tuple[int, int] | None:
        """Returns which share of each batch this rank takes, and how many there are; None for one for each rank."""

    def begin(self, module: nn.Module) -> None:
        """Puts the wrapper of the module to rest, and gives all ranks the values that rank 0 has of what they share."""

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism whose release is of the sum over all ranks."""

    def gradient(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Returns a value, as the mechanism released it, as a gradient that fits the parameter."""


@final
class Joined:
    """The ranks that train one model.

    Args:
        agreement: of the ranks.
        holding: what they hold of the model.
        found: what was found, in words.
        bookkeeping: of the same ranks, where they train another model too.
    """

    def __init__(
        self, agreement: Agreement, holding: Holding, *, found: str, bookkeeping: Bookkeeping | None = None
    ) -> None:
        self.found = found
        self._agreement = agreement
        self.holding = holding
        self._bookkeeping = Bookkeeping(agreement) if bookkeeping is None else bookkeeping

    def beside(self, other: Ranks) -> Ranks:
        """Returns the ranks of another model, with the ledger of these."""
        assert isinstance(other, Joined)
        return Joined(self._agreement, other.holding, found=self.found, bookkeeping=self._bookkeeping)

    @property
    def first(self) -> bool:
        """Returns whether this is rank 0, which writes the ledger and checkpoints."""
        return self._agreement.rank == 0

    @property
    def share(self) -> Share:
        """Returns every W-th example of each batch, W being the number of ranks that see other examples."""
        place, shares = self.holding.place or (self._agreement.rank, self._agreement.size)
        return Share(rank=place, ranks=shares, together=self.spread.collective)

    @property
    def spread(self) -> Spread:
        """Returns how forwards and sums see the model."""
        return self.holding.spread

    def together(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context on one rank an error on all. Nothing inside may talk to other ranks."""
        return self._agreement.together()

    def telling(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context an error of the other ranks too, where they meet next."""
        return self._agreement.telling()

    def running(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context, where models run, an error of the other ranks too."""
        return self._ending() if self.spread.collective else self._agreement.telling()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Makes an error inside of the context the end of this rank's part: the others wait inside of a forward."""
        try:
            yield
        except Exception as error:
            self._agreement.leave(error)
            raise

    def compare(self, facts: Mapping[str, object]) -> None:
        """Raises RanksError on every rank if the facts are not the same on all of them."""
        self._agreement.compare(facts)

    def begin(self, module: nn.Module) -> None:
        """Puts the wrapper of the module to rest, and gives all ranks the values that rank 0 has of what they share."""
        self.holding.begin(module)

    def key(self, key: NoiseKey) -> NoiseKey:
        """Returns the one key of all ranks: the reproducible one that each has, or one that rank 0 has sent.

        Raises:
            RanksError: if the ranks have unlike reproducible keys.
        """
        self.compare({"noise_generator": key.fingerprint() or "none"})
        if key.predictable:
            return key
        return NoiseKey.shared(self._agreement.from_rank(0, key.derive("ranks") if self.first else b""))

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism whose release is of the sum over all ranks."""
        return self.holding.noise(mechanism)

    def gradient(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """Returns a released value as a gradient that fits the parameter."""
        return self.holding.gradient(parameter, value)

    def ledger(self, ledger: LedgerLike) -> LedgerLike:
        """Returns the ledger on rank 0, and on the others a mirror of it."""
        return self._bookkeeping.ledger(ledger)

    def agreed(self, due: Callable[[], Due]) -> BatchTicket | None:
        """Returns the ticket of the step that all ranks are about to take, or None if none of them has one."""

        def checked() -> Due:
            self._bookkeeping.refuse_own()
            return due()

        return self._agreement.agreed(checked)

    def written(self, write: Callable[[], Sequence[Event]], ledger: LedgerLike) -> None:
        """Calls `write` on rank 0, and elsewhere once rank 0 has told that it wrote."""
        self._bookkeeping.written(write, ledger)
