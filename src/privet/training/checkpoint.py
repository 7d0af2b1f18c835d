"""Checkpoints: everything a resumed run needs but keys, loaded without running code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from privet.accounting.role import LedgerLike
from privet.errors import ConfigurationError
from privet.training.update import PrivateUpdate

__all__ = ["load", "save"]

_FORMAT = 1


def _settings(update: PrivateUpdate) -> dict[str, Any]:
    """Returns what must be the same on resuming."""
    return {"mechanism": repr(update.settled), "divisor": update.divisor, "parameters": list(update.parameters)}


def _refuse_other_shapes(path: object, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises before torch would, which loads what fits and only then complains of the rest."""
    found, expected = ({n: tuple(getattr(v, "shape", ())) for n, v in state.items()} for state in (saved, now))
    if found != expected:
        names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        differences = "; ".join(f"{n}: saved {found.get(n)}, now {expected.get(n)}" for n in names)
        raise ConfigurationError(
            f"{path} holds another module: {differences}. "
            "Expected the same names and shapes. Build the module of the saved run."
        )


def save(
    path: str | os.PathLike[str],
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ledger: LedgerLike,
    updates: Sequence[PrivateUpdate],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint; the file is complete or not there at all."""
    state = {
        "format": _FORMAT,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ledger": ledger.state_dict(),
        "updates": [{"settings": _settings(u), "state": u.state_dict()} for u in updates],
        "extra": dict(extra or {}),
    }
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def load(
    path: str | os.PathLike[str],
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ledger: LedgerLike,
    updates: Sequence[PrivateUpdate],
) -> dict[str, Any]:
    """Resumes from a checkpoint, and returns its `extra`.

    Raises:
        ConfigurationError: if the file is of another format, or its settings differ. Nothing is changed then.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ConfigurationError(f"{path} is not a checkpoint of this version. Expected format {_FORMAT}.")
    found = [saved["settings"] for saved in state["updates"]]
    expected = [_settings(update) for update in updates]
    if found != expected:
        differences = [
            f"{key}: saved {a.get(key)!r}, now {b.get(key)!r}"
            for a, b in zip(found, expected, strict=False)
            for key in b
            if a.get(key) != b.get(key)
        ]
        raise ConfigurationError(
            f"{path} was saved under other settings: {'; '.join(differences) or 'another number of private modules'}. "
            "Expected the same. Call make_private with the saved run's settings before loading."
        )
    for update, saved in zip(updates, state["updates"], strict=True):
        update.refuse_state(saved["state"])
    _refuse_other_shapes(path, state["module"], module.state_dict())
    ledger.load_state_dict(state["ledger"])  # first: it may refuse, and nothing is changed then
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for update, saved in zip(updates, state["updates"], strict=True):
        update.load_state_dict(saved["state"])
    extra = state["extra"]
    assert isinstance(extra, dict)
    return extra
