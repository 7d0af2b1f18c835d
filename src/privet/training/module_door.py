"""The modules that one engine has made private: an end to that, and their states, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from privet.accounting.role import LedgerLike
from privet.errors import ProtocolError
from privet.parallel import bare
from privet.training.checkpoint import File, load, save
from privet.training.door import Door
from privet.training.once import ended
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

    def detach(self, module: nn.Module, *, public: bool = False) -> None:
        """Makes a private module and its optimizer ordinary ones again, in place. What was billed stays on the ledger.

        Hooks and attributes are taken away, and gradients that wait in `p.grad`. The private loader goes on, and its
        batches are announced to nobody. What trains the module from now on is not private. The module may be made
        private anew, by this engine or another one.

        Args:
            module: what make_private returned.
            public: says that nothing will ask the private data until the module is made private again: it is trained
                on public data, say, or gets the weights of an earlier step. Otherwise, if its weights have changed by
                then, epsilon is infinite.

        Raises:
            ProtocolError: if the module is not private here, inside of a logical step or of a BatchMemoryManager, or
                on several ranks. Nothing is changed then.

        Example:
            >>> import torch
            >>> from privet import PrivacyEngine
            >>> engine, model = PrivacyEngine(), torch.nn.Linear(4, 2)
            >>> model, optimizer, loader = engine.make_private(
            ...     module=model,
            ...     optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            ...     data_loader=torch.utils.data.DataLoader(torch.zeros(64, 4), batch_size=16),
            ...     noise_multiplier=1.1,
            ...     max_grad_norm=1.0,
            ... )
            >>> engine.detach(model)
            >>> model(torch.ones(1, 4)).sum().backward()  # without privacy
            >>> model.weight.grad is None
            False
        """
        inner = bare(module)
        found = [watched for watched in self._watched if watched.module is inner]
        if not found:
            raise ProtocolError(
                f"this {type(module).__name__} is not private here: this engine has made "
                f"{', '.join(self._trained()) or 'nothing'} private. Expected the module that make_private returned. "
                "Ask the engine that has made it private."
            )
        watched = found[0]
        optimizer = watched.update.optimizer
        watched.detach()
        self._watched.remove(watched)
        ended(inner, optimizer, watched.making, public=public)

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
