"""From the uses that one backward recorded to the clipped sum: norms, then weights, then weighted sums.

Axes: B units of privacy (examples, or their owners), R rows of a use, K clipping groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from privet.gradients.clipped_sum import ClippedSum
from privet.gradients.derived import Derivation, disjoint, pull_back, pull_back_rows
from privet.gradients.rows import of_type, row_norms
from privet.gradients.rules.gram import NARROW, gram_padding
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.tracing import tracing
from privet.gradients.use import Allowance, Owner, Recorded, Use, Uses
from privet.gradients.weights import Policy, groups_of, sensitivity_of, weights_of

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
    """Runs a function without autograd, and without autocast: a backward inside its context would round the norms."""

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


@dataclass(eq=False)
class _Gathered:
    """All that one backward recorded of one parameter."""

    parameter: Tensor
    direct: list[Uses]
    derived: list[tuple[Derivation, list[Uses]]]
    owner: Owner

    @property
    def _sole(self) -> Uses | None:
        """Returns the uses if one rule knows them all."""
        return self.direct[0] if len(self.direct) == 1 and not self.derived else None

    @property
    def _moved(self) -> list[tuple[Derivation, Uses]] | None:
        """Returns the derived uses if the norms of their parts are the parameter's."""
        if self.direct or any(len(groups) != 1 for _, groups in self.derived):
            return None
        derivations = [d for d, _ in self.derived]
        if not all(d.isometric for d in derivations) or not disjoint(derivations):
            return None
        return [(d, groups[0]) for d, groups in self.derived]

    def _one_row_each(self, uses: Uses) -> bool:
        return self.owner.index is None and all(use.rows == self.owner.units for use in uses)

    def squared_norms(self) -> Tensor:  # (B,)
        """Returns the squared norm of each unit's gradient."""
        if (sole := self._sole) is not None and self._one_row_each(sole):
            return sole.rule.squared_norms(sole)
        if (moved := self._moved) is not None and all(self._one_row_each(uses) for _, uses in moved):
            return torch.stack([uses.rule.squared_norms(uses) for _, uses in moved]).sum(0)
        if self.owner.index is not None:
            return row_norms(self.per_unit(slice(0, self.owner.units)))
        if (tied := self._tied_norms()) is not None:
            return tied
        size = 4 * self.parameter.numel()
        return torch.cat([row_norms(self.per_unit(chunk)) for chunk in row_chunks(self.owner.units, size)])

    def _tied_norms(self) -> Tensor | None:  # (B,)
        """Returns the norms of a sum of two gradients by their own norms and their inner product, if that is known.

        Where the two nearly cancel, the gradient is formed instead, for those units alone.
        """
        if tracing() or self.derived or len(self.direct) != 2 or not all(map(self._one_row_each, self.direct)):
            return None
        first, second = (Uses(uses.items, allowance=Allowance(0)) for uses in self.direct)  # no rows of them are kept
        found = _inner_products(first, second) or _inner_products(second, first)
        if found is None:
            return None
        inner, size = found
        apart = first.rule.squared_norms(first) + second.rule.squared_norms(second)
        padding = (apart + 2.0 * size) * gram_padding(self.parameter.shape[-1], inner.dtype)
        norms = (apart + 2.0 * inner + padding).clamp(min=0.0)
        close = (padding > NARROW * norms) | (apart > 4.0 * norms)
        for unit in (close & apart.isfinite() & inner.isfinite() & (apart > 0.0)).nonzero()[:, 0].tolist():
            norms[unit] = row_norms(self.per_unit(slice(unit, unit + 1)))[0]
        return norms

    def per_unit(self, units: slice) -> Tensor:  # (B', *shape)
        """Returns the gradients of some units, instantiated. With a given owner, of all."""
        total: Tensor | None = None
        for uses in self.direct:
            rows = self._unit_rows(uses, units)
            total = rows if total is None else total + rows
        for derivation, groups in self.derived:
            for uses in groups:
                rows = pull_back_rows(derivation, self.parameter, self._unit_rows(uses, units))
                total = rows if total is None else total + rows
        assert total is not None
        return total

    def _unit_rows(self, uses: Uses, units: slice) -> Tensor:
        if self.owner.index is not None:
            rows = uses.rule.per_example(uses)
            return self.owner_of(uses).scatter_sum(rows)
        repeat = uses.rows // self.owner.units
        part = uses.narrowed(units.start * repeat, units.stop * repeat)
        rows = uses.rule.per_example(part)
        return rows if repeat == 1 else rows.view(-1, repeat, *rows.shape[1:]).sum(1)

    def owner_of(self, uses: Uses) -> Owner:
        """Returns the owner of each row of the uses: several rows of one example lie together."""
        examples = self.owner.units if self.owner.index is None else len(self.owner.index)
        repeat = uses.rows // examples if examples else 1
        if repeat == 1:
            return self.owner
        index = torch.arange(examples, device=uses[0].gradient.device) if self.owner.index is None else self.owner.index
        return Owner(self.owner.units, index.repeat_interleave(repeat))

    def weighted_sum(self, weights: Tensor) -> Tensor:  # (B,) -> shape
        """Returns the weighted sum of the units' gradients."""
        total: Tensor | None = None
        for uses in self.direct:
            value = uses.rule.weighted_sum(uses, self.owner_of(uses).gather(weights))
            total = value if total is None else total + value
        for derivation, groups in self.derived:
            for uses in groups:
                value = uses.rule.weighted_sum(uses, self.owner_of(uses).gather(weights))
                value = pull_back(derivation, self.parameter, value)
                total = value if total is None else total + value
        assert total is not None
        return total

    def masked(self, dropped: Tensor) -> _Gathered:  # (B,) bool
        """Returns the same without any value of the dropped units."""

        def without(uses: Uses) -> Uses:
            return uses.masked(self.owner_of(uses).gather(dropped))

        derived = [(d, [without(uses) for uses in groups]) for d, groups in self.derived]
        return _Gathered(self.parameter, [without(uses) for uses in self.direct], derived, self.owner)


def _inner_products(uses: Uses, others: Uses) -> tuple[Tensor, Tensor] | None:
    factors = others.rule.factors(others)
    return None if factors is None else uses.rule.inner_products(uses, *factors)


def _by_rule(uses: Sequence[Use], allowance: Allowance) -> list[Uses]:
    groups: dict[tuple[int, tuple[int, ...]], list[Use]] = {}
    for use in uses:
        groups.setdefault((id(use.rule), (use.rows,)), []).append(use)
    return [Uses(tuple(group), allowance=allowance) for group in groups.values()]


def _gathered(
    recorded: Recorded, parameters: Mapping[str, nn.Parameter], owner: Owner, *, allowance: Allowance | None = None
) -> dict[str, _Gathered]:
    allowance = allowance or Allowance()
    found: dict[str, _Gathered] = {}
    derived: dict[str, list[tuple[Derivation, list[Uses]]]] = {}
    for derivation, uses in recorded.derived.items():
        for source in derivation.sources:
            derived.setdefault(source, []).append((derivation, _by_rule(uses, allowance)))
    for name, parameter in parameters.items():
        direct = _by_rule(recorded.direct.get(name, ()), allowance)
        if direct or name in derived:
            found[name] = _Gathered(parameter, direct, derived.get(name, []), owner)
    return found


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
    gathered = _gathered(recorded, parameters, owner)
    members: list[list[tuple[Tensor, nn.Parameter]]] = [[] for _ in set(group_of.values())]
    for name, mine in gathered.items():
        members[group_of[name]].append((mine.squared_norms(), parameters[name]))
    squared = reducer.sum(total_norms(members, owner.units, parameters) * scale**2)
    weights, left_out = weights_of(policy, squared, absent)
    if left_out is not None:
        gathered = {name: g.masked(left_out) for name, g in gathered.items()}
    weights = weights * scale
    for name, parameter in parameters.items():
        if name in gathered:
            value = gathered.pop(name).weighted_sum(weights[group_of[name]])
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
    return total + sum(p.numel() for _, p in group) * torch.finfo(dtype).tiny


def statistics_of(squared: Tensor, left_out: Tensor | None, absent: Tensor | None) -> dict[str, Tensor]:
    """Returns what a clipped sum tells of its units; those that were absent from the start are not counted."""
    dropped = left_out if left_out is None or absent is None else left_out & ~absent
    count = squared.new_zeros((), dtype=torch.int64) if dropped is None else dropped.sum()
    return {"dropped": count, "norms": squared}


@_in_full
def squared_norms(recorded: Recorded, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:  # name -> (B,)
    """Returns the squared norms of the examples' gradients of every parameter that has a use, in little memory."""
    found = _gathered(recorded, parameters, Owner(recorded.examples or 0), allowance=Allowance(0))  # no sums follow
    return {name: gathered.squared_norms() for name, gathered in found.items()}


@_in_full
def masked_sums(
    recorded: Recorded,
    parameters: Mapping[str, nn.Parameter],
    weights: Tensor,  # (B,)
    dropped: Tensor | None,  # (B,) bool
) -> dict[str, Tensor]:
    """Returns the weighted sums of the examples' gradients, no value of a dropped one having a part in them."""
    found = _gathered(recorded, parameters, Owner(recorded.examples or 0))
    if dropped is not None:
        found = {name: gathered.masked(dropped) for name, gathered in found.items()}
    return {name: gathered.weighted_sum(weights) for name, gathered in found.items()}


@_in_full
def per_example_gradients(
    recorded: Recorded, parameters: Mapping[str, nn.Parameter], *, scale: float = 1.0
) -> dict[str, Tensor]:  # name -> (B, *shape)
    """Returns every example's gradient, unclipped: for checks, and for modes that promise them."""
    owner = Owner(recorded.examples or 0)
    everything = slice(0, owner.units)
    found = _gathered(recorded, parameters, owner)
    every = itertools.chain(*recorded.direct.values(), *recorded.derived.values())
    held = {t.untyped_storage().data_ptr() for use in every for t in (use.gradient, *use.data) if t is not None}
    return {name: _times(scale, gathered.per_unit(everything), held) for name, gathered in found.items()}


def _times(scale: float, rows: Tensor, held: Collection[int]) -> Tensor:
    """Returns the rows times the scale: the same memory, for they are the largest tensors of all, if it is theirs."""
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
    found = _gathered(recorded, parameters, Owner(recorded.examples or 0))
    sizes = {name: float(g.squared_norms().sum().sqrt()) for name, g in found.items()}
    return [{name: g.weighted_sum(w) for name, g in found.items()} for w in weights], sizes
