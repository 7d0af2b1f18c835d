"""The modules that one door of the paper's kind has made private: their states, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from privet.accounting.role import LedgerLike
from privet.errors import ProtocolError
from privet.training.checkpoint import File, load, save
from privet.training.door import Door
from privet.training.private_module import PrivateModule
from privet.training.update import PrivateUpdate

__all__ = ["ModuleDoor"]


class ModuleDoor(Door):
    """A door that knows the modules it has made private.

    Args:
        ledger: the ledger.
    """

    def __init__(self, ledger: LedgerLike) -> None:
        super().__init__(ledger)
        self._watched: list[PrivateModule] = []

    def _updates(self) -> Sequence[PrivateUpdate]:
        return [watched.update for watched in self._watched]

    def _trained(self) -> Sequence[str]:
        return [type(watched.module).__name__ for watched in self._watched]

    def save_checkpoint(
        self, path: File, *, module: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Writes model, optimizer, ledger and counters to a path or an open file, without any key.

        A file at the path is replaced at once, and is complete or not there at all.
        """
        save(
            path, module=module, optimizer=optimizer, ledger=self.ledger, updates=self._updates_of(module), extra=extra
        )

    def load_checkpoint(self, path: File, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Resumes from a path or an open file under the same settings, and returns what was saved as `extra`.

        Loading runs no code from the file. Noise goes on with a fresh key; steps taken here since are still billed.

        Raises:
            ConfigurationError: if the settings differ from those of the saved run.
        """
        return load(path, module=module, optimizer=optimizer, ledger=self.ledger, updates=self._updates_of(module))

    def _updates_of(self, module: nn.Module) -> list[PrivateUpdate]:
        ours = {id(p) for p in module.parameters()}
        found = [w.update for w in self._watched if any(id(p) in ours for p in w.update.parameters.values())]
        if not found:
            raise ProtocolError(
                "this module is not private here. Call make_private first, with the settings of the saved run."
            )
        return found
