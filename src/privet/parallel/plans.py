"""Operations on parameters that a tensor parallel plan laid out, done by operations on the local parts.

The rules of per-example gradients are told of local tensors alone. What a rank finds of an example's gradient:

parameter                          data                         gradient of an example here
Shard(0) of a matrix and its bias  whole                        the own rows of it
Shard(1) of a matrix               the own features             the own columns of it
bias added to sums of parts        whole                        all of it, on every rank
Shard(0) of an embedding           whole, own indices alone     the own rows of it
Shard(1) of an embedding           whole                        the own columns of it
Replicate                          whole                        all of it, on every rank
Replicate                          the own positions            a term: the terms are added up before any norm is taken

All else is refused: what its gradients would be is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F

from privet.errors import UnsupportedModelError
from privet.gradients.rules.partial_linear import partial_linear
from privet.gradients.spread import LocalCalls
from privet.parallel.agreement import Agreement

__all__ = ["Plans"]

_BY_POSITION = (
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    Tensor.__rmul__,
    torch.add,
    Tensor.add,
    Tensor.__add__,
    Tensor.__radd__,
)
"""What a weight of the last axes does to each position alone."""
_WAYS = (
    "Expected ColwiseParallel or RowwiseParallel on nn.Linear and nn.Embedding, SequenceParallel on normalisation "
    "layers, and parameters outside of the plan that meet whole tensors"
)


@final
class Plans:
    """The operations of one model on the parts that its ranks hold.

    Args:
        group: of the ranks that hold parts of the parameters, and see the same examples.
        agreement: of all ranks.
        split: the names of the parameters of which each of them holds another part.
    """

    def __init__(self, group: dist.ProcessGroup, agreement: Agreement, split: frozenset[str]) -> None:
        self._group = group
        self._first = dist.get_rank(group) == 0
        self._agreement = agreement
        self._split = split

    # -- see `gradients.spread.Parts` --------------------------------------------------------------------------------

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the own part as a parameter in the same memory."""
        assert isinstance(parameter, DTensor)
        with torch.no_grad():
            return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], calls: LocalCalls) -> Any:
        """Runs one operation by operations on the own parts, and returns its result.

        Raises:
            UnsupportedModelError: if it is not known what they would be, with the parameter by name.
        """
        call = _OnParts(func, [*args, *kwargs.values()], calls, first=self._first, add_up=self._add_up)
        if func is F.linear:
            return call.linear(*args, **kwargs)
        if func is F.embedding:
            return call.embedding(*args, **kwargs)
        if func in {F.layer_norm, F.rms_norm, torch.layer_norm}:
            return call.norm(*args, **kwargs)
        if func in _BY_POSITION and len(args) == 2 and not kwargs:
            return call.by_position()
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.requires_grad:
            call.refuse(f"met {getattr(func, '__name__', func)}")
        return result

    def own(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        """Returns the own part of a parameter's gradient, of which each rank may have a term."""
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            return gradient
        found: DTensor = gradient.redistribute(placements=parameter.placements)
        return found.detach().to_local()  # type: ignore[no-any-return, attr-defined]

    def unlike(self, gradients: Mapping[str, Tensor]) -> list[str]:
        """Returns which parameters that are whole on every rank have other gradients on some ranks of the group."""
        names = sorted(set(gradients) - self._split)
        if not names:
            return []
        mine = [gradients[name].detach().float().reshape(-1) for name in names]
        firsts = torch.cat(mine)
        self._agreement.guarded(lambda: dist.broadcast(firsts, group=self._group, group_src=0))
        pairs = zip(mine, torch.split(firsts, [len(each) for each in mine]), strict=True)
        sizes = torch.stack([torch.stack([(own - first).norm(), first.norm()]) for own, first in pairs])
        self._agreement.guarded(lambda: dist.all_reduce(sizes, dist.ReduceOp.MAX, group=self._group))
        # Beside the largest of them, a gradient that cancels to nothing is rounding, which may differ.
        allowed = 1e-2 * sizes[:, 1] + 1e-3 * sizes[:, 1].max()
        return [name for name, unlike in zip(names, (sizes[:, 0] > allowed).tolist(), strict=True) if unlike]

    def _add_up(self, rows: Tensor) -> Tensor:
        """Returns the sum of the ranks' terms of each example's gradient."""
        total = rows.clone(memory_format=torch.contiguous_format)
        self._agreement.guarded(lambda: dist.all_reduce(total, group=self._group))
        return total


@final
class _OnParts:
    """One operation in which parameters take part."""

    def __init__(
        self,
        func: Callable[..., Any],
        given: Sequence[Any],
        calls: LocalCalls,
        *,
        first: bool,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        self._func = func
        self._args = given
        self._calls = calls
        self._first = first
        self._add_up = add_up
        found = [(value, local) for value in given if (local := calls.local(value)) is not None]
        self._name = ", ".join(calls.name_of(local) for _, local in found) or "a parameter"

    def refuse(self, what: str) -> NoReturn:
        """Raises for this operation."""
        raise UnsupportedModelError(
            f"{self._name}, of which each rank holds a part or a copy, {what}, in a way that is not known to keep "
            f"examples' gradients in parts. {_WAYS}. Change the plan, or leave this parameter out of it."
        )

    # -- the operations ----------------------------------------------------------------------------------------------

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 - torch's own name
        """Runs a linear layer of which each rank has some outputs, or some inputs, or all."""
        x, mesh = self._data(input)
        placed, its_bias = self._placed(weight), None if bias is None else self._placed(bias)
        (at,) = x.placements
        last = x.dim() - 1
        if placed == Shard(0) and at == Replicate() and its_bias in {None, Shard(0)}:
            local = x.to_local(grad_placements=[Partial()])
            out = self._calls.intercept(F.linear, (local, self._own(weight), self._own(bias)), {})
            return _distributed(out, mesh, Shard(last), (*x.shape[:-1], weight.shape[0]))
        if placed == Shard(1) and at == Shard(last) and its_bias in {None, Replicate()}:
            # Each rank adds its part of the inputs. The bias is added once; its gradient is whole on all of them.
            given = (x.to_local(), self._own(weight), self._own(bias))
            out = self._calls.intercept(partial_linear, given, {"adds_bias": self._first})
            return DTensor.from_local(out, mesh, [Partial()], run_check=False)
        if placed == Replicate() and its_bias in {None, Replicate()}:
            return self._replicated(x, mesh, (weight, bias), ahead=1, run=lambda t, w, b: (F.linear, (t, w, b), {}))
        return self.refuse(f"is placed {placed} and met data that are placed {at}")

    def embedding(  # noqa: PLR0917 - torch's own signature
        self,
        input: Any,  # noqa: A002
        weight: Any,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
        sparse: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Looks rows up in a table of which each rank has some rows, or some columns."""
        ids, mesh = self._data(input)
        placed = self._placed(weight)
        if max_norm is not None or scale_grad_by_freq or sparse or ids.placements != (Replicate(),):
            self.refuse("is a table with max_norm, scale_grad_by_freq, sparse gradients or distributed indices")
        mine, table = ids.to_local(), self._own(weight)
        if placed == Shard(1):
            out = self._calls.intercept(F.embedding, (mine, table), {"padding_idx": padding_idx})
            return _distributed(out, mesh, Shard(ids.dim()), (*ids.shape, weight.shape[1]))
        if placed != Shard(0):
            return self.refuse(f"is a table that is placed {placed}")
        start = mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
        elsewhere = (mine < start) | (mine >= start + table.shape[0])
        padding = None if padding_idx is None else padding_idx % weight.shape[0] - start
        padding = padding if padding is not None and 0 <= padding < table.shape[0] else None
        rows = (mine - start).masked_fill(elsewhere, 0)
        if table.shape[0] == 0:  # a rank behind the last row: it has nothing to look up
            self.refuse("is a table with fewer rows than ranks")
        out = self._calls.intercept(F.embedding, (rows, table), {"padding_idx": padding})
        return DTensor.from_local(out.masked_fill(elsewhere.unsqueeze(-1), 0), mesh, [Partial()], run_check=False)

    def norm(
        self,
        input: Any,  # noqa: A002
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: Any = None,
        *_: Any,
    ) -> Any:
        """Normalises each position, of which each rank may have some."""
        x, mesh = self._data(input)
        shape = list(normalized_shape)
        if any(p is not None and self._placed(p) != Replicate() for p in (weight, bias)):
            self.refuse("is the weight of a normalisation, and not whole on every rank")

        def run(t: Tensor, w: Any, b: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
            if self._func is F.rms_norm:
                return F.rms_norm, (t, shape, w, eps), {}
            return F.layer_norm, (t, shape, w, b, 1e-5 if eps is None else eps), {}

        return self._replicated(x, mesh, (weight, bias), ahead=len(shape), run=run)

    def by_position(self) -> Any:
        """Multiplies each position by a weight, or adds it."""
        a, b = self._args
        weight_first = self._calls.local(a) is not None
        weight, other = (a, b) if weight_first else (b, a)
        if self._calls.local(other) is not None or self._placed(weight) != Replicate():
            self.refuse(f"met {getattr(self._func, '__name__', self._func)}")
        x, mesh = self._data(other)
        if weight.dim() >= x.dim():
            self.refuse("has as many axes as the data")

        def run(t: Tensor, w: Any, _: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
            return self._func, (w, t) if weight_first else (t, w), {}

        return self._replicated(x, mesh, (weight, None), ahead=weight.dim(), run=run)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def _replicated(
        self,
        x: DTensor,
        mesh: DeviceMesh,
        parameters: tuple[Any, Any],
        *,
        ahead: int,
        run: Callable[[Tensor, Any, Any], tuple[Any, tuple[Any, ...], dict[str, Any]]],
    ) -> Any:
        """Runs an operation of whole parameters on all positions, or on those of this rank."""
        (at,) = x.placements
        func, args, kwargs = run(x.to_local(), *map(self._own, parameters))
        if at == Replicate():
            out = self._calls.intercept(func, args, kwargs)
        elif isinstance(at, Shard) and 0 < at.dim < x.dim() - ahead:
            out = self._calls.intercept_shared(func, args, kwargs, self._add_up)
        else:
            self.refuse(f"met data that are placed {at}")
        return _distributed(out, mesh, at, (*x.shape[:-1], out.shape[-1]))

    def _data(self, value: Any) -> tuple[DTensor, DeviceMesh]:
        """Returns data with their mesh, and raises if they are not on one of one dimension, or wait to be added up."""
        if not isinstance(value, DTensor):
            self.refuse("met a tensor that is not distributed")
        if value.device_mesh.ndim != 1 or not isinstance(value.placements[0], Shard | Replicate):
            self.refuse(f"met data that are placed {value.placements}")
        (at,) = value.placements
        if isinstance(at, Shard) and at.dim == 0:
            self.refuse("met data whose examples lie on several ranks")
        return value, value.device_mesh

    def _placed(self, parameter: Any) -> Placement:
        if not isinstance(parameter, DTensor) or len(parameter.placements) != 1:
            self.refuse("met a tensor that is not in the plan")
        return parameter.placements[0]

    def _own(self, parameter: Any) -> Any:
        """Returns the own part of a parameter: the one that is watched, or a constant if it does not train."""
        if parameter is None:
            return None
        local = self._calls.local(parameter)
        return parameter.detach().to_local() if local is None or not local.requires_grad else local


def _distributed(out: Tensor, mesh: DeviceMesh, placement: Placement, shape: tuple[int, ...]) -> DTensor:
    """Returns a local result as a part of the whole one."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return DTensor.from_local(
        out, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=tuple(reversed(strides))
    )
