"""Checkpoints: everything a resumed run needs but keys, loaded without running code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from privet.accounting.role import LedgerLike
from privet.errors import ConfigurationError
from privet.parallel.mesh import bare
from privet.parallel.names import canonical_names
from privet.training.collective import refuse_single_file
from privet.training.update import PrivateUpdate

__all__ = ["File", "load", "load_state", "save", "state_of"]

_FORMAT = 2
File = str | os.PathLike[str] | IO[bytes]


def _settings(update: PrivateUpdate) -> dict[str, Any]:
    """Returns what must be the same on resuming."""
    return {"mechanism": repr(update.settled), "divisor": update.divisor.value, "parameters": list(update.parameters)}


def state_of(ledger: LedgerLike, updates: Sequence[PrivateUpdate]) -> dict[str, Any]:
    """Returns the ledger and the counters of a run."""
    for update in updates:
        update.settle()
    return {
        "format": _FORMAT,
        "ledger": ledger.state_dict(),
        "updates": [{"settings": _settings(update), "state": update.state_dict()} for update in updates],
    }


def _refuse_state(source: object, state: object, updates: Sequence[PrivateUpdate]) -> None:
    """Raises ConfigurationError if a state is of another format, or was saved under other settings."""
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise ConfigurationError(f"{source} is not a checkpoint of this version. Expected format {_FORMAT}.")
    found = [dict(saved["settings"]) for saved in state["updates"]]
    expected = [_settings(update) for update in updates]
    for theirs, ours in zip(found, expected, strict=False):
        if ours["divisor"] is None:  # it follows from a dataset that this run has not met yet
            ours["divisor"] = theirs.get("divisor")
    if found != expected:
        differences = [
            f"{key}: saved {a.get(key)!r}, now {b.get(key)!r}"
            for a, b in zip(found, expected, strict=False)
            for key in b
            if a.get(key) != b.get(key)
        ]
        raise ConfigurationError(
            f"{source} was saved under other settings: "
            f"{'; '.join(differences) or 'another number of private modules'}. "
            "Expected the same. Call make_private with the saved run's settings before loading."
        )
    for update, saved in zip(updates, state["updates"], strict=True):
        update.refuse_state(saved["state"])


def load_state(
    source: object, state: Mapping[str, Any], *, ledger: LedgerLike, updates: Sequence[PrivateUpdate]
) -> None:
    """Resumes ledger and counters.

    Args:
        source: what the state came from, for errors.
        state: as `state_of` returned it.
        ledger: gets what the saved one holds beyond it.
        updates: get the counters.

    Raises:
        ConfigurationError: if the format or the settings differ. Nothing is changed then.
        LedgerError: if the ledgers do not fit. Nothing is changed then.
    """
    _refuse_state(source, state, updates)
    ledger.load_state_dict(state["ledger"])  # first: it may refuse, and nothing is changed then
    for update, saved in zip(updates, state["updates"], strict=True):
        if update.divisor.value is None:
            update.divisor.value = saved["settings"]["divisor"]
        update.load_state_dict(saved["state"])


def _refuse_other_shapes(source: object, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises before torch would, which loads what fits and only then complains of the rest."""
    found, expected = ({n: tuple(getattr(v, "shape", ())) for n, v in state.items()} for state in (saved, now))
    if found != expected:
        names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        differences = "; ".join(f"{n}: saved {found.get(n)}, now {expected.get(n)}" for n in names)
        raise ConfigurationError(
            f"{source} holds another module: {differences}. "
            "Expected the same names and shapes. Build the module of the saved run."
        )


def _names(module: nn.Module) -> dict[str, str]:
    """Returns each name of a module's state without what wrappers put into it, by the name with it."""
    return canonical_names(module, module.state_dict())


def _named(module: nn.Module) -> dict[str, Any]:
    """Returns the state of a module by the names that it has without wrappers, which a resumed run may not have."""
    inner = bare(module)
    state = inner.state_dict()
    return {name: state[own] for own, name in _names(inner).items()}


def save(
    file: File,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ledger: LedgerLike,
    updates: Sequence[PrivateUpdate],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint to a path or an open file. A file at a path is complete or not there at all.

    Of several ranks, which all hold the same, only rank 0 writes. Others need not call it.
    """
    for update in updates:
        refuse_single_file(update.ranks.spread)
    if not all(update.ranks.first for update in updates):
        return
    state = {
        **state_of(ledger, updates),
        "module": _named(module),
        "optimizer": optimizer.state_dict(),
        "extra": dict(extra or {}),
    }
    if not isinstance(file, str | os.PathLike):
        torch.save(state, file)
        return
    target = Path(file)
    # It is written beside its place and moved there at the end, so that a crash leaves the older file whole.
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as opened:
        torch.save(state, opened)
        opened.flush()
        os.fsync(opened.fileno())
    partial.replace(target)


def load(
    file: File,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ledger: LedgerLike,
    updates: Sequence[PrivateUpdate],
) -> dict[str, Any]:
    """Resumes from a path or an open file, and returns its `extra`. No code of the file is run.

    Raises:
        ConfigurationError: if the file is of another format, or its settings differ. Nothing is changed then.
    """
    for update in updates:
        refuse_single_file(update.ranks.spread)
    state = torch.load(file, map_location="cpu", weights_only=True)
    _refuse_state(file, state, updates)
    _refuse_other_shapes(file, state["module"], _named(module))
    load_state(file, state, ledger=ledger, updates=updates)
    inner = bare(module)
    inner.load_state_dict({own: state["module"][name] for own, name in _names(inner).items()})
    optimizer.load_state_dict(state["optimizer"])
    extra = state["extra"]
    assert isinstance(extra, dict)
    return extra
