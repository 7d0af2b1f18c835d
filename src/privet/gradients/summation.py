"""From the uses that one backward recorded to the clipped sum: norms, then weights, then weighted sums.

Axes: B units of privacy (examples, or their owners), K clipping groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.gathered import gathered
from privet.gradients.rows import lost, of_type, raised
from privet.gradients.use import Allowance, Owner, Recorded
from privet.gradients.weights import Policy, groups_of, magnification_of, sensitivity_of, weights_of

__all__ = [
    "DictSink",
    "LocalNorms",
    "NormReducer",
    "SumSink",
    "clipped_sum",
    "masked_sums",
    "per_example_gradients",
    "squared_norms",
    "statistics_of",
    "total_norms",
    "weighted_sums",
]


_In = ParamSpec("_In")
_Out = TypeVar("_Out")


def _in_full(function: Callable[_In, _Out]) -> Callable[_In, _Out]:
    """Returns the function run without autograd and in full precision.

    Users may call backward inside of an autocast context, which would round the norms to half precision.
    """

    @functools.wraps(function)
    def run(*args: _In.args, **kwargs: _In.kwargs) -> _Out:
        with torch.no_grad():
            cast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
            if not cast:
                return function(*args, **kwargs)
            with ExitStack() as contexts:
                for device in cast:
                    contexts.enter_context(torch.autocast(device, enabled=False))
                return function(*args, **kwargs)

    return run


class NormReducer(Protocol):
    """Adds up the squared norms of a model that is split over ranks, before any weight is taken from them."""

    def sum(self, squared_norms: Tensor) -> Tensor:  # (K, B) -> (K, B)
        """Returns the squared norms over the whole model."""


class SumSink(Protocol):
    """Takes each parameter's sum as soon as it is formed; a whole-model sum need never exist."""

    def put(self, name: str, value: Tensor) -> None:
        """Takes the sum of one parameter."""

    def values(self) -> Mapping[str, Tensor]:
        """Returns what is to be released from here, by parameter name."""


class LocalNorms:
    """The whole model is here."""

    def sum(self, squared_norms: Tensor) -> Tensor:
        """Returns its argument."""
        return squared_norms


class DictSink:
    """Keeps all sums, in a dict."""

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def put(self, name: str, value: Tensor) -> None:
        """Keeps the sum of one parameter."""
        self._values[name] = value

    def values(self) -> Mapping[str, Tensor]:
        """Returns all sums."""
        return self._values


@_in_full
def clipped_sum(
    recorded: Recorded,
    parameters: Mapping[str, nn.Parameter],
    policy: Policy,
    *,
    scale: float = 1.0,
    owner: Owner | None = None,
    absent: Tensor | None = None,  # (B,) bool
    reducer: NormReducer | None = None,
    sink: SumSink | None = None,
    names: Sequence[str] | None = None,
) -> ClippedSum:
    """Returns the sum of the clipped per-example gradients that one backward recorded.

    Args:
        recorded: the uses. Their gradients are those of `sum_i loss_i / scale`.
        parameters: the trainable parameters, by name. One without a use gets a sum of zero.
        policy: the clipping policy.
        scale: what the loss was divided by: B for a mean.
        owner: the unit of privacy of each example; by default each example is one.
        absent: units that only fill up a batch of fixed size: they weigh nothing, and are not counted.
        reducer: adds up norms over ranks that hold parts of the model; by default all of it is here.
        sink: takes the sums as they are formed; by default a dict.
        names: all trainable parameters of the model, where `parameters` are those that this rank holds, maybe none: the
            groups are the whole model's, the same on every rank.

    Guarantees:
        One unit, added or removed, moves the sum by at most `policy.sensitivity`, up to rounding: each weighted sum of
        B terms in float32 errs by about `B u` of the terms' sizes, u = 6e-8. A unit whose norm is not finite weighs
        nothing, and is counted in `statistics["dropped"]`. Norms too small for the number format count as the smallest
        that it has.
    """
    examples = recorded.examples or 0
    owner = Owner(examples) if owner is None else owner
    reducer = LocalNorms() if reducer is None else reducer
    sink = DictSink() if sink is None else sink
    whole = list(parameters if names is None else names)
    group_of = dict(zip(whole, groups_of(policy, whole), strict=True))
    sensitivity = sensitivity_of(policy)
    found = gathered(recorded, parameters, owner)
    members: list[list[tuple[Tensor, nn.Parameter]]] = [[] for _ in set(group_of.values())]
    for name, mine in found.items():
        members[group_of[name]].append((mine.squared_norms(), parameters[name]))
    squared = owner.weighted(reducer.sum(total_norms(members, owner.units, parameters) * scale**2), 2)
    weights, left_out = weights_of(policy, squared, absent)
    magnified = magnification_of(sensitivity)
    weights = owner.weighted(weights * (scale * magnified))  # the recorded gradients are those of the loss over `scale`
    for name, parameter in parameters.items():
        if name in found:
            # Taken out of the dict, so that its memory is free before the next parameter's sum is formed.
            mine = found.pop(name)
            # A weight of zero is not enough: zero times NaN is NaN.
            mine = mine if left_out is None else mine.masked(left_out)
            value = mine.weighted_sum(weights[group_of[name]])
            value = value if magnified == 1.0 else value / magnified
            value = value if value.shape == parameter.shape else value.view(parameter.shape)
        else:
            wide_type = torch.promote_types(parameter.dtype, torch.float32)
            value = torch.zeros(parameter.shape, device=parameter.device, dtype=wide_type)
        sink.put(name, value)
    return ClippedSum(sink.values(), sensitivity, statistics_of(squared, left_out, absent))


def total_norms(
    groups: Sequence[Sequence[tuple[Tensor, nn.Parameter]]],  # (B,) squared norms of parameters, by group
    units: int,
    parameters: Mapping[str, nn.Parameter],
) -> Tensor:  # (K, B)
    """Returns the squared norms over each group, squares that underflowed counted as the smallest number."""
    device = next((p.device for p in parameters.values()), torch.device("cpu"))  # a rank may hold no parameter
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    return torch.stack([_group_norms(group, units, dtype=dtype, device=device) for group in groups])


def _group_norms(
    group: Sequence[tuple[Tensor, nn.Parameter]], units: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:  # (B,)
    if not group:
        return torch.zeros(units, dtype=dtype, device=device)
    norms = [of_type(norm, dtype) for norm, _ in group]
    total = torch.stack(norms).sum(0) if len(norms) > 1 else norms[0]
    # A square below the smallest number counts as zero, and too small a norm gets too large a weight. What all entries
    # may have lost is added, each in the type that squared it.
    return raised(total, sum(lost(p.numel(), norm.dtype) for norm, p in group))


def statistics_of(squared: Tensor, left_out: Tensor | None, absent: Tensor | None) -> dict[str, Tensor]:
    """Returns what a clipped sum tells of its units; those that were absent from the start are not counted."""
    dropped = left_out if left_out is None or absent is None else left_out & ~absent
    count = squared.new_zeros((), dtype=torch.int64) if dropped is None else dropped.sum()
    return {"dropped": count, "norms": squared}


@_in_full
def squared_norms(
    recorded: Recorded, parameters: Mapping[str, nn.Parameter], owner: Owner | None = None
) -> dict[str, Tensor]:  # name -> (B,)
    """Returns the squared norms of the units' summed gradients of every parameter that has a use, in little memory."""
    owner = Owner(recorded.examples or 0) if owner is None else owner
    found = gathered(recorded, parameters, owner, allowance=Allowance(0))  # no weighted sum follows
    return {name: mine.squared_norms() for name, mine in found.items()}


@_in_full
def masked_sums(
    recorded: Recorded,
    parameters: Mapping[str, nn.Parameter],
    weights: Tensor,  # (B,)
    dropped: Tensor | None,  # (B,) bool
    owner: Owner,
) -> dict[str, Tensor]:
    """Returns the weighted sums of the units' summed gradients, no value of a dropped one having a part in them."""
    found = gathered(recorded, parameters, owner)
    if dropped is not None:
        found = {name: mine.masked(dropped) for name, mine in found.items()}
    return {name: mine.weighted_sum(weights) for name, mine in found.items()}


@_in_full
def per_example_gradients(
    recorded: Recorded, parameters: Mapping[str, nn.Parameter], *, scale: float = 1.0
) -> dict[str, Tensor]:  # name -> (B, *shape)
    """Returns every example's gradient, unclipped: for checks, and for modes that promise them."""
    owner = Owner(recorded.examples or 0)
    everything = slice(0, owner.units)
    found = gathered(recorded, parameters, owner)
    every = itertools.chain(*recorded.direct.values(), *recorded.derived.values())
    held = {t.untyped_storage().data_ptr() for use in every for t in (use.gradient, *use.data) if t is not None}
    return {name: _times(scale, mine.per_unit(everything), held) for name, mine in found.items()}


def _times(scale: float, rows: Tensor, held: Collection[int]) -> Tensor:
    """Multiplies the rows by the scale, in place where nobody else holds their memory, and returns them.

    They are the largest tensors of all: a copy would double the memory that is needed.
    """
    spread = any(stride == 0 and size > 1 for stride, size in zip(rows.stride(), rows.shape, strict=True))
    if spread or rows.untyped_storage().data_ptr() in held:
        return rows * scale
    return rows if scale == 1.0 else rows.mul_(scale)


@_in_full
def weighted_sums(
    recorded: Recorded,
    parameters: Mapping[str, nn.Parameter],
    weights: Sequence[Tensor],  # (B,) each
) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
    """Returns the sums of examples' gradients under each of several weightings, and the size of each parameter's part.

    Not clipped, and so for checks alone. The size is the root of the sum of the examples' squared norms.
    """
    found = gathered(recorded, parameters, Owner(recorded.examples or 0))
    sizes = {name: float(g.squared_norms().sum().sqrt()) for name, g in found.items()}
    return [{name: g.weighted_sum(w) for name, g in found.items()} for w in weights], sizes
