"""The ranks of a module of which each holds a part: read from the meshes that its parameters lie on.

what is found                                     ranks that see other examples     ranks that see the same examples
fully_shard, on a mesh of one dimension           all                               none
fully_shard, on (replicas, parts)                 all                               none
a tensor parallel plan, on a mesh of all ranks    none                              all
a plan on mesh["tp"], fully_shard on mesh["dp"]   those of dp                       those of tp
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from privet.errors import ConfigurationError
from privet.parallel.agreement import Agreement
from privet.parallel.forwards import Groups
from privet.parallel.groups import group_for, meeting_for
from privet.parallel.joined import Joined
from privet.parallel.layout import Layout, layouts_of
from privet.parallel.names import canonical_names
from privet.parallel.sharded import Sharded

__all__ = ["fully_sharded"]


def fully_sharded(module: nn.Module) -> Joined:
    """Returns the ranks that hold the parts of a module together.

    Raises:
        ConfigurationError: if it is sharded in a way that is not supported, with the parameters by name.
    """
    gathered = [child for child in module.modules() if isinstance(child, FSDPModule)]
    for child in gathered:
        child.reshard()  # a forward before may have left gathered parameters in place
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    names = canonical_names(module, named)
    layouts = layouts_of({names[name]: p for name, p in named.items()}, gathered=bool(gathered))
    spread = {name: layout for name, layout in layouts.items() if isinstance(layout.parameter, DTensor)}
    if not spread:
        raise ConfigurationError(
            "no trainable parameter of the module lies on several ranks, and others do. Expected at least one. Freeze "
            "no part alone that a plan has laid out, or leave the plan away."
        )
    mesh = _mesh_of(spread)
    ranks = mesh.mesh.flatten().tolist()
    like = mesh.get_group(0)
    backend = dist.get_backend(like)

    def group(purpose: str, members: Sequence[int]) -> dist.ProcessGroup:
        return group_for(purpose, members, like=like, backend=backend)

    own = dist.get_rank()
    parts, replicas, same = _dimensions(mesh, spread, gathered=bool(gathered))
    if not gathered and len(ranks) < dist.get_world_size():
        raise ConfigurationError(
            f"a tensor parallel plan lies on ranks {ranks} of {dist.get_world_size()}. Expected it on all ranks, or "
            "the rest of them to train on other examples: make a mesh of (dp, tp), give the plan mesh['tp'], and call "
            "fully_shard(module, mesh=mesh['dp']) after it."
        )
    groups = Groups(
        parts=group("sums", [own] if parts is None else _members(mesh, parts)),
        replicas=None if replicas is None else group("sums", _members(mesh, replicas)),
        ranks=group("values", ranks),
        same=None if same is None else group("norms", _members(mesh, same)),
    )
    agreement = Agreement(meeting_for(groups.ranks))
    size = "x".join(map(str, mesh.mesh.shape))
    found = [*(["fully_shard"] if gathered else []), *(["a tensor parallel plan"] if same is not None else [])]
    return Joined(
        agreement,
        Sharded(module, layouts, groups, agreement),
        found=f"{size} ranks, {' over '.join(found)} on each, {backend}",
    )


def _members(mesh: DeviceMesh, dimension: int) -> list[int]:
    return dist.get_process_group_ranks(mesh.get_group(dimension))


def _dimensions(
    mesh: DeviceMesh, layouts: Mapping[str, Layout], *, gathered: bool
) -> tuple[int | None, int | None, int | None]:
    """Returns which dimension of the mesh cuts parameters, which has copies of the parts, and which a plan uses."""
    if not gathered:
        return None, None, 0
    if mesh.ndim == 1:
        return 0, None, None
    return (1, 0, None) if _is_hybrid(layouts) else (0, None, 1)


def _is_hybrid(layouts: Mapping[str, Layout]) -> bool:
    """Returns whether parameters are cut over the second dimension of their mesh, and the first has copies."""
    placements = [layout.parameter.placements for layout in layouts.values()]  # type: ignore[attr-defined]
    return any(len(each) == 2 and type(each[0]) is Replicate for each in placements)


def _mesh_of(layouts: Mapping[str, Layout]) -> DeviceMesh:
    """Returns the mesh that all parameters lie on, or on one dimension of it.

    Raises:
        ConfigurationError: if there is none, or its ranks are not in ascending order.
    """
    meshes: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[str, DeviceMesh]] = {}
    for name, layout in layouts.items():
        mesh = layout.parameter.device_mesh  # type: ignore[attr-defined]
        meshes.setdefault((tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist())), (name, mesh))
    largest = max((mesh for _, mesh in meshes.values()), key=lambda mesh: mesh.ndim)
    # Outside of a plan, `fully_shard` sees the first dimension alone: the ranks with this one's place in the second.
    allowed = {(tuple(largest.mesh.shape), tuple(largest.mesh.flatten().tolist()))}
    if largest.ndim == 2 and not _is_hybrid(layouts):
        allowed.add(((largest.size(0),), tuple(_members(largest, 0))))
    if set(meshes) - allowed:
        raise ConfigurationError(
            f"parameters are sharded over {len(meshes)} different meshes, such as those of "
            f"{', '.join(name for name, _ in meshes.values())}. Expected one mesh. Give the same mesh to every "
            "fully_shard, and to every plan."
        )
    ranks = largest.mesh.flatten().tolist()
    if ranks != sorted(ranks) or dist.get_rank() not in ranks:
        raise ConfigurationError(
            f"the mesh has ranks {ranks}. Expected ascending order, and this rank, {dist.get_rank()}, in it."
        )
    return largest
