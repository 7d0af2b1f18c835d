"""What ranks there are: read from the module's wrapper, or from the default process group. Nothing has to be said.

found                                            result
no process group, or a group of one              one process
DistributedDataParallel                          replicated, over its group
a plain module, and a default group of several   replicated, over the default group
fully_shard on the module and its parts          sharded, over the mesh of its parameters
started by torchrun, and no process group        refused: every process would train, and bill, by itself
another wrapper, or other sharded parameters     refused by name
"""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from privet.errors import ConfigurationError
from privet.parallel.agreement import Agreement
from privet.parallel.groups import meeting_for
from privet.parallel.joined import Joined
from privet.parallel.reduction import backend_of
from privet.parallel.replicated import Replicated
from privet.parallel.role import Alone, Ranks

__all__ = ["bare", "ranks_for", "refuse_late_wrapper", "refuse_ranks"]

_LOG = logging.getLogger("privet")
_ORDER = (
    "The order is: init_process_group, then DistributedDataParallel or fully_shard (or no wrapper), then the "
    "optimizer, then make_private or PrivateStep."
)


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
        if _is_sharded(module):
            raise ConfigurationError(
                "the module is sharded, and no process group is initialized, so that its parts on other ranks are out "
                f"of reach. Expected the process group that it was sharded on. {_ORDER}"
            )
        _refuse_lonely_ranks()
        return Alone()
    if _is_sharded(module):
        # Imported here: it loads much of torch that other trainings have no use for.
        from privet.parallel.fully_sharded import fully_sharded

        return _said(fully_sharded(module))
    wrapped = isinstance(module, DistributedDataParallel)
    group = module.process_group if isinstance(module, DistributedDataParallel) else dist.group.WORLD
    assert group is not None
    size = dist.get_world_size(group)
    if size == 1:
        return Alone()
    backend = backend_of(group, next((p.device for p in module.parameters()), torch.device("cpu")))
    found = f"{size} ranks, {'DistributedDataParallel' if wrapped else 'a plain module'} on each, {backend}"
    agreement = Agreement(group if backend == "gloo" else meeting_for(group))
    return _said(Joined(agreement, Replicated(group, agreement), found=found))


def _said(ranks: Joined) -> Joined:
    """Logs what was found, on rank 0, and returns it."""
    if ranks.first:
        _LOG.info("privet trains on %s", ranks.found)
    return ranks


def _is_sharded(module: nn.Module) -> bool:
    """Returns whether a part of the module is fully sharded, or has a parameter that lies on several ranks."""
    return any(_kinds(child) & {"FSDPModule"} for child in module.modules()) or any(
        map(_is_spread, module.parameters())
    )


def _kinds(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def _is_spread(parameter: nn.Parameter) -> bool:
    return any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__)


def refuse_late_wrapper() -> None:
    """Raises if a DistributedDataParallel runs its forward now that was made after its module became private."""
    # Torch tells its compiler so which wrapper is running. There is no other way to ask from inside of the module.
    active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)()
    if active is not None and active.require_backward_grad_sync:
        raise ConfigurationError(
            "the module was made private, and then wrapped in DistributedDataParallel, whose reducer would wait for "
            f"gradients that never come. Expected the wrapper first. {_ORDER}"
        )


def _refuse_wrappers(module: nn.Module) -> None:
    """Raises for what wraps the module, or a part of it, in a way that is not supported."""
    given: object = module
    if not isinstance(given, nn.Module):  # it is refused where its parameters are asked for
        return
    for name, child in module.named_modules():
        where = f"{name or 'the module'} is"
        if isinstance(child, DataParallel):
            raise ConfigurationError(
                f"{where} a DataParallel, whose replicas share one process. Expected one process for each device. "
                f"Start the script with torchrun. {_ORDER}"
            )
        if "FullyShardedDataParallel" in _kinds(child):
            raise ConfigurationError(
                f"{where} a FullyShardedDataParallel, which lays parameters into one flat tensor, so that the "
                "gradients of one parameter cannot be told apart. Expected its successor: "
                "torch.distributed.fsdp.fully_shard(block) for each block, then fully_shard(model). "
                f"{_ORDER}"
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


def refuse_ranks(what: str) -> None:
    """Raises if this is one of several processes, of which each would release `what` with noise of its own."""
    _refuse_lonely_ranks()
    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        raise ConfigurationError(
            f"{what} was asked for on {size} ranks: each would release it with noise of its own, and bill one. "
            "Expected one process. Release it before init_process_group(), and hand the number to all ranks."
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
