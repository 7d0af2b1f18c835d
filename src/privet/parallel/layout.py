"""Where the parts of each parameter lie: which ranks hold them, and which elements this rank holds.

mesh                          placements              what a rank holds
(W,)                          Shard(d)                every W-th part of axis d, as `torch.chunk` cuts it
(R, W), hybrid sharding       Replicate, Shard(d)     the same, R times over
(T,), tensor parallel         Shard(d) or Replicate   a part of axis d, or all of it
(W, T), both                  Shard(d), one of these  a part of axis d of what tensor parallel alone would hold

A parameter is first split between the ranks of a tensor parallel group, which see the same examples. What each of them
holds is then cut between ranks that see other examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from privet.errors import ConfigurationError
from privet.noise.source import Piece
from privet.parallel.role import fitting

__all__ = ["Layout", "layouts_of"]


@dataclass(frozen=True, eq=False)
class Layout:
    """How one parameter lies on the ranks.

    Attributes:
        parameter: as the module and the optimizer hold it.
        axis: the axis that is cut.
        place: which part this rank holds.
        parts: how many parts there are.
        split: the axis that is split over the tensor parallel group, or None if each of its ranks has all.
        split_place: which part of that this rank's group of cut parts makes up.
        split_parts: how many there are of them.
    """

    parameter: Tensor
    axis: int = 0
    place: int = 0
    parts: int = 1
    split: int | None = None
    split_place: int = 0
    split_parts: int = 1

    def _share(self, axis: int) -> tuple[int, int]:
        """Returns where on an axis the part of the tensor parallel group begins, and its length."""
        size = self.parameter.shape[axis]
        return _part(size, self.split_place, self.split_parts) if axis == self.split else (0, size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of all that is cut: of the whole parameter, or of what tensor parallel would hold here."""
        return tuple(self._share(axis)[1] for axis in range(self.parameter.dim()))

    @property
    def each(self) -> int:
        """Returns the length of every part but the last ones, which are shorter or empty."""
        return -(-self.shape[self.axis] // self.parts)

    @property
    def first(self) -> int:
        """Returns the first index of the own part on the axis."""
        return _part(self.shape[self.axis], self.place, self.parts)[0]

    @property
    def length(self) -> int:
        """Returns the length of the own part on the axis."""
        return _part(self.shape[self.axis], self.place, self.parts)[1]

    @property
    def local(self) -> tuple[int, ...]:
        """Returns the shape of what this rank holds."""
        return (*self.shape[: self.axis], self.length, *self.shape[self.axis + 1 :]) if self.shape else ()

    @property
    def padded(self) -> tuple[int, ...]:
        """Returns the shape of a part, were all of them as long as the first."""
        return (*self.shape[: self.axis], self.each, *self.shape[self.axis + 1 :])

    def cut(self, value: Tensor) -> Tensor:  # the shape -> (parts, elements of a padded part)
        """Returns the parts of a value, filled up with zeros, one row each."""
        if self.parts == 1:
            return value.reshape(1, -1)
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
        if self.parts == 1:
            return row.view(self.shape).contiguous()
        return row.view(self.padded).narrow(self.axis, 0, self.length).contiguous()

    def pieces(self) -> list[Piece]:
        """Returns where each run of consecutive elements of the own part lies in the whole parameter."""
        whole = tuple(self.parameter.shape)
        starts = [self._share(axis)[0] for axis in range(len(whole))]
        if self.parts > 1:
            starts[self.axis] += self.first
        lengths = self.local
        steps = [prod(whole[axis + 1 :]) for axis in range(len(whole))]
        # Behind the last axis of which a part is missing here, elements lie one after the other.
        last = max((axis for axis, size in enumerate(whole) if lengths[axis] != size), default=-1)
        run = prod(lengths[max(last, 0) :])
        if not run or not prod(lengths):
            return []
        inside = sum(start * step for start, step in zip(starts, steps, strict=True))
        outer = [range(0, lengths[axis] * steps[axis], steps[axis]) for axis in range(max(last, 0))]
        offsets = (inside + sum(place) for place in itertools.product(*outer))
        return [Piece(start=number * run, offset=offset, size=run) for number, offset in enumerate(offsets)]

    def gradient(self, value: Tensor) -> Tensor:  # the shape of the own part
        """Returns the own part of a gradient as the optimizer expects it."""
        p = self.parameter
        if not isinstance(p, DTensor):
            return fitting(p, value)
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _part(size: int, place: int, parts: int) -> tuple[int, int]:
    """Returns where one of several parts begins, as `torch.chunk` cuts them, and its length."""
    each = -(-size // parts)
    first = min(place * each, size)
    return first, min(each, size - first)


def layouts_of(parameters: Mapping[str, nn.Parameter], *, gathered: bool) -> dict[str, Layout]:
    """Returns how each trainable parameter of a module lies on the ranks.

    Args:
        parameters: by name.
        gathered: whether `fully_shard` cuts them, which has to be all of them then.

    Raises:
        ConfigurationError: if one is placed in a way that is not supported, with all of them by name.
    """
    found: dict[str, Layout] = {}
    whole, strange = [], []
    for name, p in parameters.items():
        if not isinstance(p, DTensor):
            whole.append(name)
            found[name] = Layout(p)
            continue
        layout = _layout(p, gathered=gathered)
        local = tuple(p.to_local().shape)
        if layout is None:
            strange.append(f"{name} {p.placements}")
        elif local != layout.local:
            strange.append(f"{name}, of which this rank holds {local}")
        else:
            found[name] = layout
    if whole and gathered:
        raise ConfigurationError(
            f"trainable parameters are whole on every rank, in a module of which other parts are sharded: "
            f"{', '.join(whole)}. Expected all of them sharded. Call fully_shard on the root module too, after its "
            "parts, and without ignored_params."
        )
    if strange:
        raise ConfigurationError(
            f"parameters are placed on ranks in a way that is not supported: {'; '.join(strange)}. Expected "
            "fully_shard on a mesh of one dimension, or of two for hybrid sharding; a tensor parallel plan on one "
            "dimension; or fully_shard over mesh['dp'] of what a plan has laid out over mesh['tp']."
        )
    return found


def _layout(p: DTensor, *, gathered: bool) -> Layout | None:
    """Returns how one distributed parameter lies on the ranks, or None if in no way that is known."""
    mesh, placements = p.device_mesh, p.placements
    if not gathered:
        return _split(p, mesh, 0, placements[0]) if mesh.ndim == 1 and _is_plain(placements[0]) else None
    if mesh.ndim == 1 and type(placements[0]) is Shard:
        return Layout(p, placements[0].dim, mesh.get_local_rank(0), mesh.size(0))
    if mesh.ndim != 2:
        return None
    if type(placements[0]) is Replicate and type(placements[1]) is Shard:  # hybrid sharding
        return Layout(p, placements[1].dim, mesh.get_local_rank(1), mesh.size(1))
    cut: Placement = placements[0]
    if isinstance(cut, Shard) or type(cut).__name__ == "_StridedShard":
        cuts = {"axis": cut.dim, "place": mesh.get_local_rank(0), "parts": mesh.size(0)}  # type: ignore[attr-defined]
        return _split(p, mesh, 1, placements[1], **cuts) if _is_plain(placements[1]) else None
    return None


def _is_plain(placement: Placement) -> bool:
    return type(placement) in {Shard, Replicate}


def _split(p: DTensor, mesh: DeviceMesh, dimension: int, placement: Placement, **cuts: int) -> Layout:
    """Returns the layout of a parameter that one dimension of a mesh splits, or has copies of."""
    if not isinstance(placement, Shard):
        return Layout(p, **cuts)
    return Layout(
        p,
        **cuts,
        split=placement.dim,
        split_place=mesh.get_local_rank(dimension),
        split_parts=mesh.size(dimension),
    )
