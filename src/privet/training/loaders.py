"""The private loaders of a run: whose batches are announced to it, and which follow its sampling rate."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from privet.errors import ConfigurationError
from privet.sampling.base import BatchTicket, Sampling
from privet.sampling.loader import PrivateLoader
from privet.sampling.users import Users

__all__ = ["Loaders"]


class Loaders:
    """Knows the loaders of one run, and keeps none of them alive.

    Args:
        announce: called with the ticket of every batch that one of them is about to hand over.
    """

    def __init__(self, announce: Callable[[BatchTicket], None]) -> None:
        self._announce = announce
        self._resampled = False
        self._any = False
        self.users: Users | None = None  # who is drawn, where the rows of batches are records of users
        self._kept: list[weakref.ref[PrivateLoader]] = []

    def follow(self, loader: PrivateLoader) -> None:
        """Hears of every batch of a loader, which follows changes of the sampling rate in turn.

        Raises:
            ConfigurationError: if one loader draws users, and another examples.
        """
        if self._any and repr(loader.users) != repr(self.users):
            raise ConfigurationError(
                f"a loader of {loader.users or 'examples'} follows one of {self.users or 'examples'} in one training, "
                "whose gradients are clipped by one rule. Expected the same users= for all of its loaders."
            )
        self._any, self.users = True, loader.users
        loader.on_batch(self._announce)
        if self._resampled:
            loader.expect_resampling()
        self._kept = [kept for kept in self._kept if kept() is not None] + [weakref.ref(loader)]

    def end(self) -> None:
        """Hears of no batch any more."""
        for loader in self._alive():
            loader.forget(self._announce)
        self._kept = []

    def follows(self, loader: PrivateLoader) -> bool:
        """Returns whether the loader's batches are announced here."""
        return any(kept is loader for kept in self._alive())

    def _alive(self) -> list[PrivateLoader]:
        return [loader for loader in (kept() for kept in self._kept) if loader is not None]

    def expect_resampling(self) -> None:
        """Prepares the loaders for a sampling rate that changes."""
        self._resampled = True
        for loader in self._alive():
            loader.expect_resampling()

    def resample(self, sampling: Sampling) -> None:
        """Makes all loaders draw under another rate from now on."""
        for loader in self._alive():
            loader.resample(sampling)
