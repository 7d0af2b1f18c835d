"""Replicated training: every rank holds the whole model, and computes the clipped sum of its share of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from privet.accounting.event import Event
from privet.accounting.role import LedgerLike
from privet.noise import NoiseMechanism
from privet.noise.key import NoiseKey
from privet.parallel.agreement import Agreement
from privet.parallel.mirror import Bookkeeping
from privet.parallel.reduction import Reduced
from privet.parallel.role import Due
from privet.sampling.base import BatchTicket
from privet.sampling.share import Share

__all__ = ["Replicated"]


@final
class Replicated:
    """The ranks of one process group, each with the whole model.

    Args:
        group: moves the sums, on the device of the model.
        meeting: of the same ranks, with the gloo backend: moves numbers and words between hosts.
        found: what was found, in words.
    """

    def __init__(self, group: dist.ProcessGroup, meeting: dist.ProcessGroup, *, found: str) -> None:
        self.group = group
        self.found = found
        self._agreement = Agreement(meeting)
        self._bookkeeping = Bookkeeping(self._agreement)

    @property
    def first(self) -> bool:
        """Returns whether this is rank 0, which writes the ledger and checkpoints."""
        return self._agreement.rank == 0

    @property
    def share(self) -> Share:
        """Returns every W-th example of each batch, W being the number of ranks."""
        return Share(rank=self._agreement.rank, ranks=self._agreement.size)

    def together(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context on one rank an error on all. Nothing inside may talk to other ranks."""
        return self._agreement.together()

    def telling(self) -> AbstractContextManager[None]:
        """Makes an error inside of the context an error of the other ranks too, at their next `agreed`."""
        return self._agreement.telling()

    def compare(self, facts: Mapping[str, object]) -> None:
        """Raises RanksError on every rank if the facts are not the same on all of them."""
        self._agreement.compare(facts)

    def begin(self, module: nn.Module) -> None:
        """Puts the reducer of DistributedDataParallel to rest, and gives all ranks the values of rank 0.

        The reducer would wait for gradients that never come, since none reaches a parameter before the noise. Its
        buckets stay allocated.
        """
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = False
            module.require_forward_param_sync = False
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                self._broadcast(value)

    def _broadcast(self, value: Tensor) -> None:
        """Gives a tensor the value that it has on rank 0."""
        # As bytes, which every backend moves, whatever the type and the layout of the tensor.
        raw = value.detach().reshape(-1).clone().view(torch.uint8)
        if raw.numel():
            self._agreement.guarded(lambda: dist.broadcast(raw, group=self.group, group_src=0))
            value.copy_(raw.view(value.dtype).view(value.shape))

    def key(self, key: NoiseKey) -> NoiseKey:
        """Returns the one key of all ranks: the reproducible one that each has, or one that rank 0 has sent.

        Raises:
            RanksError: if the ranks have unlike reproducible keys.
        """
        self.compare({"noise_generator": key.fingerprint() or "none"})
        if key.predictable:
            return key
        return NoiseKey.shared(self._agreement.from_first(key.derive("ranks") if self.first else b""))

    def noise(self, mechanism: NoiseMechanism) -> NoiseMechanism:
        """Returns the mechanism whose release is of the sum over all ranks."""
        return Reduced(mechanism, self.group, self._agreement)

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
