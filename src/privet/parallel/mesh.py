"""What ranks there are: read from the module's wrapper, or from the default process group. Nothing has to be said.

found                                            result
no process group, or a group of one              one process
DistributedDataParallel                          replicated, over its group
a plain module, and a default group of several   replicated, over the default group
started by torchrun, and no process group        refused: every process would train, and bill, by itself
another wrapper, or sharded parameters           refused by name
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from privet.errors import ConfigurationError
from privet.parallel.reduction import backend_of
from privet.parallel.replicated import Replicated
from privet.parallel.role import Alone, Ranks

__all__ = ["bare", "ranks_for", "refuse_late_wrapper"]

_LOG = logging.getLogger("privet")
_ORDER = (
    "The order is: init_process_group, then DistributedDataParallel (or no wrapper), then the optimizer, then "
    "make_private or PrivateStep."
)
_MEETINGS: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []  # a group, and the one of gloo that was made for it


def bare(module: nn.Module) -> nn.Module:
    """Returns the module inside of DistributedDataParallel; any other module as it is."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def ranks_for(module: nn.Module) -> Ranks:
    """Returns the ranks that train a module together, as they are found. Every rank calls it.

    Raises:
        ConfigurationError: if the module is wrapped in a way that is not supported, or several processes were started
            and no process group was.
    """
    _refuse_wrappers(module)
    if not dist.is_available() or not dist.is_initialized():
        _refuse_lonely_ranks()
        return Alone()
    wrapped = isinstance(module, DistributedDataParallel)
    group = module.process_group if isinstance(module, DistributedDataParallel) else dist.group.WORLD
    assert group is not None
    size = dist.get_world_size(group)
    if size == 1:
        return Alone()
    backend = backend_of(group, next((p.device for p in module.parameters()), torch.device("cpu")))
    found = f"{size} ranks, {'DistributedDataParallel' if wrapped else 'a plain module'} on each, {backend}"
    ranks = Replicated(group, _meeting(group, backend), found=found)
    if ranks.first:
        _LOG.info("privet trains on %s", found)
    return ranks


def refuse_late_wrapper() -> None:
    """Raises if a DistributedDataParallel runs its forward now that was made after its module became private."""
    # Torch tells its compiler so which wrapper is running. There is no other way to ask from inside of the module.
    active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None and active.require_backward_grad_sync:
        raise ConfigurationError(
            "the module was made private, and then wrapped in DistributedDataParallel, whose reducer would wait for "
            f"gradients that never come. Expected the wrapper first. {_ORDER}"
        )


def _timeout(group: dist.ProcessGroup, backend: str) -> timedelta | None:
    """Returns the timeout that the user gave to a group, or None if torch does not tell it."""
    kind = "cuda" if backend == "nccl" else "cpu"
    try:  # torch has no public way to read what was given to init_process_group
        found: Any = group._get_backend(torch.device(kind)).options._timeout  # noqa: SLF001
    except (AttributeError, RuntimeError):
        return None
    return found if isinstance(found, timedelta) else None


def _meeting(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """Returns a group of the same ranks that moves numbers between hosts: no device is waited for to read them."""
    if backend == "gloo":
        return group
    for known, made in _MEETINGS:
        if known is group:
            return made
    members, timeout = dist.get_process_group_ranks(group), _timeout(group, backend)
    made = dist.new_group(members, timeout, backend="gloo", use_local_synchronization=True)
    _MEETINGS.append((group, made))
    return made  # type: ignore[no-any-return]


def _refuse_wrappers(module: nn.Module) -> None:
    """Raises for what wraps the module, or a part of it, in a way that is not supported."""
    given: object = module
    if not isinstance(given, nn.Module):  # it is refused where its parameters are asked for
        return
    for name, child in module.named_modules():
        kinds = {kind.__name__ for kind in type(child).__mro__}
        where = f"{name or 'the module'} is"
        if isinstance(child, DataParallel):
            raise ConfigurationError(
                f"{where} a DataParallel, whose replicas share one process. Expected one process for each device. "
                f"Start the script with torchrun. {_ORDER}"
            )
        if "FullyShardedDataParallel" in kinds:
            raise ConfigurationError(
                f"{where} a FullyShardedDataParallel, which lays parameters into one flat tensor, so that the "
                f"gradients of one parameter cannot be told apart. Expected DistributedDataParallel. {_ORDER}"
            )
        if "FSDPModule" in kinds or any(type(p).__name__ == "DTensor" for p in child.parameters(recurse=False)):
            raise ConfigurationError(
                f"{where} sharded (fully_shard, or tensor parallel), which is not supported yet. Expected the whole "
                f"model on every rank. {_ORDER}"
            )
        if isinstance(child, DistributedDataParallel):
            _refuse_reducers(name, child)


def _refuse_reducers(name: str, module: DistributedDataParallel) -> None:
    """Raises for a DistributedDataParallel inside of the module, or one that does more than average gradients."""
    if name:
        raise ConfigurationError(
            f"{name} is a DistributedDataParallel inside of the module. Expected one around all of it. {_ORDER}"
        )
    if module.static_graph or module.mixed_precision is not None:
        option = "static_graph=True" if module.static_graph else "mixed_precision"
        raise ConfigurationError(
            f"the DistributedDataParallel has {option}, which sends gradients, or casts parameters, by hooks of its "
            "own. Expected one without it: no gradient reaches its reducer here. Leave the option away."
        )


def _refuse_lonely_ranks() -> None:
    """Raises if this is one of several processes that a launcher started, and they do not know of each other."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1 and "RANK" in os.environ:
        raise ConfigurationError(
            f"this is one of {size} processes (WORLD_SIZE), and no process group is initialized: each of them would "
            "train on the same data and bill itself alone. Expected torch.distributed.init_process_group() before. "
            f"{_ORDER} To train in this process alone, remove WORLD_SIZE from its environment."
        )
