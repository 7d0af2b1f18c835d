"""Training in several processes, or on several devices in one: refused, until privet supports it."""

from __future__ import annotations

import torch
from torch import nn

from privet.errors import ConfigurationError

__all__ = ["refuse_ranks"]

_WRAPPERS = {
    "DataParallel": "it splits each batch over devices",
    "DistributedDataParallel": "it averages gradients over processes, before privet could clip or noise them",
    "FullyShardedDataParallel": "it averages gradients over processes, and each holds a part of the parameters",
    "FSDPModule": "fully_shard averages gradients over processes, and each holds a part of the parameters",
}


def refuse_ranks(module: nn.Module | None = None) -> None:
    """Raises if this process is one of several that train, or if the module is wrapped for several.

    Without support, every process of a group trains a model of its own on the same data, and bills its own alone.

    Raises:
        ConfigurationError: with what was found.
    """
    for name, part in () if module is None else module.named_modules():
        for kind in type(part).__mro__:
            if kind.__name__ in _WRAPPERS:
                raise ConfigurationError(
                    f"{name or 'the module'} is a {kind.__name__}: {_WRAPPERS[kind.__name__]}. Expected a module that "
                    "no wrapper for several devices or processes holds. Pass the module inside (its .module), and "
                    "train it in one process on one device."
                )
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        raise ConfigurationError(
            f"this process is one of {group.get_world_size()} of a torch.distributed group. Each would train a model "
            "of its own on the same data and bill only its own steps, so that epsilon would be too small. Expected "
            "one process. Start one, or destroy the process group before training."
        )
