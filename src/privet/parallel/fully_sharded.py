"""The ranks of a fully sharded module: read from the mesh that its parameters lie on."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from privet.errors import ConfigurationError
from privet.parallel.agreement import Agreement
from privet.parallel.groups import group_for, meeting_for
from privet.parallel.joined import Joined
from privet.parallel.layout import layouts_of
from privet.parallel.names import canonical_names
from privet.parallel.sharded import Groups, Sharded

__all__ = ["fully_sharded"]


def fully_sharded(module: nn.Module) -> Joined:
    """Returns the ranks that hold the parts of a module together.

    Raises:
        ConfigurationError: if it is sharded in a way that is not supported, with the parameters by name.
    """
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not any(isinstance(child, FSDPModule) for child in module.modules()):
        spread = [name for name, p in named.items() if isinstance(p, DTensor)]
        raise ConfigurationError(
            f"parameters are distributed over ranks, and no part of the module is fully sharded: {', '.join(spread)}. "
            "Tensor parallel plans are not supported. Expected fully_shard, DistributedDataParallel, or the whole "
            "model on every rank."
        )
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()  # a forward before may have left gathered parameters in place
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    names = canonical_names(module, named)
    layouts = layouts_of({names[name]: p for name, p in named.items()})
    if not layouts:
        raise ConfigurationError(
            "the module has no trainable parameter. Expected at least one with requires_grad=True."
        )
    mesh = next(iter(layouts.values())).parameter.device_mesh
    axis = mesh.ndim - 1
    parts, members = mesh.get_group(axis), mesh.mesh.flatten().tolist()
    backend = dist.get_backend(parts)
    replicas = mesh.get_group(0) if axis else None
    everyone = group_for("values", members, like=parts, backend=backend)
    groups = Groups(
        parts=group_for("sums", dist.get_process_group_ranks(parts), like=parts, backend=backend),
        replicas=None
        if replicas is None
        else group_for("sums", dist.get_process_group_ranks(replicas), like=parts, backend=backend),
        ranks=everyone,
    )
    size = "x".join(map(str, mesh.mesh.shape))
    agreement = Agreement(meeting_for(everyone))
    return Joined(
        agreement, Sharded(module, layouts, groups, agreement), found=f"{size} ranks, fully_shard on each, {backend}"
    )
