"""Where the shards of each parameter lie: which ranks hold them, and which elements this rank holds.

mesh                          placements            what a rank holds
(W,)                          Shard(d)              every W-th part of axis d, as `torch.chunk` cuts it
(R, W), hybrid sharding       Replicate, Shard(d)   the same, R times over
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from privet.errors import ConfigurationError
from privet.noise.source import Piece

__all__ = ["Layout", "layouts_of"]


@dataclass(frozen=True, eq=False)
class Layout:
    """How one parameter lies on the ranks.

    Attributes:
        parameter: as the module and the optimizer hold it.
        axis: the axis that is cut.
        place: which part this rank holds.
        parts: how many parts there are.
    """

    parameter: DTensor
    axis: int
    place: int
    parts: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the whole parameter."""
        return tuple(self.parameter.shape)

    @property
    def each(self) -> int:
        """Returns the length of every part but the last ones, which are shorter or empty."""
        return -(-self.shape[self.axis] // self.parts)

    @property
    def first(self) -> int:
        """Returns the first index of the own part on the axis."""
        return min(self.place * self.each, self.shape[self.axis])

    @property
    def length(self) -> int:
        """Returns the length of the own part on the axis."""
        return min(self.each, self.shape[self.axis] - self.first)

    @property
    def padded(self) -> tuple[int, ...]:
        """Returns the shape of a part, were all of them as long as the first."""
        return (*self.shape[: self.axis], self.each, *self.shape[self.axis + 1 :])

    def cut(self, value: Tensor) -> Tensor:  # the whole shape -> (parts, elements of a padded part)
        """Returns the parts of a whole value, filled up with zeros, one row each."""
        missing = self.each * self.parts - self.shape[self.axis]
        if missing:
            zeros = value.new_zeros(*self.shape[: self.axis], missing, *self.shape[self.axis + 1 :])
            filled = value.new_empty(*self.shape[: self.axis], self.each * self.parts, *self.shape[self.axis + 1 :])
            filled.narrow(self.axis, 0, self.shape[self.axis]).copy_(value)
            filled.narrow(self.axis, self.shape[self.axis], missing).copy_(zeros)
            value = filled
        split = value.view(*value.shape[: self.axis], self.parts, self.each, *value.shape[self.axis + 1 :])
        return split.movedim(self.axis, 0).reshape(self.parts, -1)

    def own(self, row: Tensor) -> Tensor:  # (elements of a padded part,) -> the shape of the own part
        """Returns the own part, without what only filled it up."""
        return row.view(self.padded).narrow(self.axis, 0, self.length).contiguous()

    def pieces(self) -> list[Piece]:
        """Returns where each run of consecutive elements of the own part lies in the whole parameter."""
        inner = prod(self.shape[self.axis + 1 :])
        run, step = self.length * inner, self.shape[self.axis] * inner
        rows = range(prod(self.shape[: self.axis]) if run else 0)
        return [Piece(start=row * run, offset=row * step + self.first * inner, size=run) for row in rows]

    def gradient(self, value: Tensor) -> DTensor:  # the shape of the own part
        """Returns the own part of a gradient as the optimizer expects it."""
        p = self.parameter
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def layouts_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Layout]:
    """Returns how each trainable parameter of a fully sharded module lies on the ranks.

    Raises:
        ConfigurationError: if one is not sharded, or in a way that is not supported, with all of them by name.
    """
    found: dict[str, Layout] = {}
    whole, strange = [], []
    for name, p in parameters.items():
        if not isinstance(p, DTensor):
            whole.append(name)
            continue
        *replicas, placement = p.placements
        plain = type(placement) is Shard and len(replicas) <= 1 and all(type(r) is Replicate for r in replicas)
        if not plain:
            strange.append(f"{name} {p.placements}")
            continue
        axis = p.device_mesh.ndim - 1
        assert isinstance(placement, Shard)
        layout = Layout(p, placement.dim, p.device_mesh.get_local_rank(axis), p.device_mesh.size(axis))
        local = tuple(p.to_local().shape)
        if local != (*layout.shape[: layout.axis], layout.length, *layout.shape[layout.axis + 1 :]):
            strange.append(f"{name}, of which this rank holds {local}")
            continue
        found[name] = layout
    if whole:
        raise ConfigurationError(
            f"trainable parameters are whole on every rank, in a module of which other parts are sharded: "
            f"{', '.join(whole)}. Expected all of them sharded. Call fully_shard on the root module too, after its "
            "parts, and without ignored_params."
        )
    if strange:
        raise ConfigurationError(
            f"parameters are placed on ranks in a way that is not supported: {'; '.join(strange)}. Expected "
            "fully_shard on a mesh of one dimension, or of two for hybrid sharding, without tensor parallel plans."
        )
    _refuse_unlike_meshes(found)
    return found


def _refuse_unlike_meshes(layouts: Mapping[str, Layout]) -> None:
    """Raises unless all parameters lie on one mesh, whose ranks are in ascending order."""
    meshes: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    for name, layout in layouts.items():
        mesh = layout.parameter.device_mesh.mesh
        meshes.setdefault((tuple(mesh.shape), tuple(mesh.flatten().tolist())), name)
    if len(meshes) > 1:
        raise ConfigurationError(
            f"parameters are sharded over {len(meshes)} different meshes, such as those of "
            f"{', '.join(meshes.values())}. Expected one mesh. Give the same mesh to every fully_shard."
        )
    ((_, ranks),) = meshes
    if list(ranks) != sorted(ranks) or dist.get_rank() not in ranks:
        raise ConfigurationError(
            f"the mesh has ranks {list(ranks)}. Expected ascending order, and this rank, {dist.get_rank()}, in it."
        )
