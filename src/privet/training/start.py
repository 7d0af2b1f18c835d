"""What all ranks of a run have to have in common when training begins."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

import torch
from torch import nn

from privet.mechanism import Mechanism

__all__ = ["facts_of"]


def facts_of(
    parameters: Mapping[str, nn.Parameter],
    *,
    mechanism: Mechanism,
    optimizer: torch.optim.Optimizer,
    divisor: float | None,
) -> dict[str, object]:
    """Returns what is compared between ranks, by its name in errors."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "parameters": {name: (tuple(p.shape), str(p.dtype)) for name, p in parameters.items()},
        "mechanism": mechanism,
        "expected batch size": divisor,
        "optimizer": f"{type(optimizer).__name__} {groups}",
        "versions": f"privet {importlib.metadata.version('privet')}, torch {torch.__version__}",
    }
