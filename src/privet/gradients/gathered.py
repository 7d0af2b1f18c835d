"""All uses of one parameter: the norms of its per-example gradients, and their weighted sum.

A parameter may be used more than once in a forward (tied weights, recurrences), by operations with different rules, as
itself or through tensors derived from it. The gradient of an example is the sum over all of that, and the norm is the
norm of the sum. So norms of single uses must not simply be added. `squared_norms` asks, in order, for the first way
that knows the norm of the sum; the last way always does.

Axes: B units of privacy (examples, or their owners), R rows of a use, those of one unit next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privet.gradients.by_owner import by_owner
from privet.gradients.derived import Derivation, disjoint, pull_back, pull_back_rows
from privet.gradients.precision import product_error
from privet.gradients.rows import padded, row_norms, summed, wide
from privet.gradients.rules.gram import NARROW, gram_padding
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.tracing import tracing
from privet.gradients.use import Allowance, Owner, Recorded, Use, Uses

__all__ = ["Gathered", "Siblings", "gathered"]


@dataclass(eq=False)
class Gathered:
    """All that one backward recorded of one parameter."""

    parameter: Tensor
    direct: list[Uses]
    derived: list[tuple[Derivation, list[Uses]]]
    units: int  # B
    siblings: Siblings | None = None  # where a derived tensor that others come from, too, is all that there is

    def rows_are_units(self, uses: Uses) -> bool:
        """Returns whether row i of each use is the only row of unit i."""
        return all(use.rows == self.units for use in uses)

    def squared_norms(self) -> Tensor:  # (B,)
        """Returns the squared norm of each unit's gradient."""
        for way in _WAYS:
            norms = way(self)
            if norms is not None:
                return norms
        raise AssertionError("the last way knows all norms")

    def per_unit(self, units: slice) -> Tensor:  # (B', *shape)
        """Returns the gradients of some units, instantiated."""
        terms = [self._unit_rows(uses, units) for uses in self.direct]
        for derivation, groups in self.derived:
            terms += pull_back_rows(derivation, [self.parameter], self.rows_of(groups, units))
        return summed(terms)

    def rows_of(self, groups: Sequence[Uses], units: slice) -> Tensor:  # (B', *derived)
        """Returns the gradients of some units with respect to what these uses are of, instantiated."""
        return summed([self._unit_rows(uses, units) for uses in groups])

    @property
    def bytes_per_unit(self) -> int:
        """Returns about how much memory one unit's gradient takes, on its way back from derived tensors included."""
        return 4 * max([self.parameter.numel(), *(derivation.tensor.numel() for derivation, _ in self.derived)])

    def norms_of(self, units: slice) -> Tensor:  # (B',)
        """Returns the squared norms of some units' gradients, instantiated.

        The weighted sum will be formed by the rules, from their own factors. So each norm is padded for what the two
        are rounded differently.
        """
        return self.padded_norms(self.per_unit(units), units)

    def padded_norms(self, rows: Tensor, units: slice) -> Tensor:  # (B', *shape) -> (B',)
        """Returns the squared norms of some units' gradients, padded for the rounding of their weighted sum."""
        norms = row_norms(rows)
        groups = [*self.direct, *(uses for _, groups in self.derived for uses in groups)]
        roundings = [r for uses in groups if (r := self._unit_rounding(uses, units)) is not None]
        return padded(norms, summed(roundings)) if roundings else norms

    def _unit_rounding(self, uses: Uses, units: slice) -> Tensor | None:  # (B',)
        """Returns the rounding errors of some units' gradients, where there is something to say of them."""
        repeat = uses.rows // self.units
        part = uses.narrowed(units.start * repeat, units.stop * repeat)
        rounding = uses.rule.rounding(part)
        if repeat > 1:  # rows of one unit may cancel, and the weighted sum adds them up in another order
            sizes = part.rule.squared_norms(part).sqrt()
            added = sizes * product_error(repeat, sizes.dtype, sizes.device)
            rounding = added if rounding is None else rounding + added
        return None if rounding is None else rounding.view(-1, repeat).sum(1)

    def _unit_rows(self, uses: Uses, units: slice) -> Tensor:
        repeat = uses.rows // self.units
        part = uses.narrowed(units.start * repeat, units.stop * repeat)
        rows = uses.rule.per_example(part)
        return rows if repeat == 1 else rows.view(-1, repeat, *rows.shape[1:]).sum(1)

    def _of_rows(self, uses: Uses, values: Tensor) -> Tensor:  # (B,) -> (R,)
        """Returns the value of each row's unit: several rows of one unit lie together."""
        repeat = uses.rows // self.units if self.units else 1
        return values if repeat == 1 else values.repeat_interleave(repeat)

    def weighted_sum(self, weights: Tensor) -> Tensor:  # (B,) -> shape
        """Returns the weighted sum of the units' gradients."""
        total: Tensor | None = None
        for uses in self.direct:
            value = uses.rule.weighted_sum(uses, self._of_rows(uses, weights))
            total = value if total is None else total + value
        if self.siblings is not None:
            return self.siblings.weighted_sum(self, weights)
        for derivation, groups in self.derived:
            # The way back is linear: the sum is pulled back once, and not each unit's gradient.
            (value,) = pull_back(derivation, [self.parameter], self.sum_of(groups, weights))
            total = value if total is None else total + value
        assert total is not None
        return total

    def sum_of(self, groups: Sequence[Uses], weights: Tensor) -> Tensor:  # (B,) -> derived shape
        """Returns the weighted sum of the units' gradients with respect to what these uses are of."""
        return summed([uses.rule.weighted_sum(uses, self._of_rows(uses, weights)) for uses in groups])

    def masked(self, dropped: Tensor) -> Gathered:  # (B,) bool
        """Returns the same without any value of the dropped units."""

        def without(uses: Uses) -> Uses:
            return uses.masked(self._of_rows(uses, dropped))

        derived = [(d, [without(uses) for uses in groups]) for d, groups in self.derived]
        return Gathered(self.parameter, [without(uses) for uses in self.direct], derived, self.units)


class Siblings:
    """Parameters whose only use is one tensor, derived from all of them. Their gradients go back at once.

    Args:
        derivation: of the tensor.
        groups: its uses.
    """

    def __init__(self, derivation: Derivation, groups: list[Uses]) -> None:
        self._derivation = derivation
        self._groups = groups
        self._members: list[Gathered] = []
        self._norms: dict[int, Tensor] = {}
        self._weights: Tensor | None = None
        self._sums: dict[int, Tensor] = {}

    def add(self, member: Gathered) -> None:
        """Adds a parameter."""
        self._members.append(member)
        member.siblings = self

    @property
    def _parameters(self) -> list[Tensor]:
        return [member.parameter for member in self._members]

    def squared_norms(self, mine: Gathered) -> Tensor:  # (B,)
        """Returns the norms of one of them; all are found with the first."""
        if not self._norms:
            size = 4 * (self._derivation.tensor.numel() + sum(p.numel() for p in self._parameters))
            parts = []
            for chunk in row_chunks(mine.units, size):
                rows = pull_back_rows(self._derivation, self._parameters, mine.rows_of(self._groups, chunk))
                parts.append([mine.padded_norms(each, chunk) for each in rows])
            self._norms = {id(m): torch.cat(n) for m, n in zip(self._members, zip(*parts, strict=True), strict=True)}
        return self._norms[id(mine)]

    def weighted_sum(self, mine: Gathered, weights: Tensor) -> Tensor:  # (B,) -> shape
        """Returns the sum of one of them; all of the same weights are found with the first."""
        same = self._weights is not None and self._weights.data_ptr() == weights.data_ptr()
        if not same or id(mine) not in self._sums:
            sums = pull_back(self._derivation, self._parameters, mine.sum_of(self._groups, weights))
            self._weights, self._sums = weights, {id(m): s for m, s in zip(self._members, sums, strict=True)}
        return self._sums.pop(id(mine))


# -- ways to the norms -----------------------------------------------------------------------------------------------


def _of_the_rule(mine: Gathered) -> Tensor | None:
    """One rule knows all uses, and each row is a unit: the rule's own formula is the cheapest there is."""
    if len(mine.direct) != 1 or mine.derived or not mine.rows_are_units(mine.direct[0]):
        return None
    return mine.direct[0].rule.squared_norms(mine.direct[0])


def _of_the_parts(mine: Gathered) -> Tensor | None:
    """The uses are of parts of the parameter that never overlap, moved but not changed: their squared norms add up."""
    if mine.direct or any(len(groups) != 1 for _, groups in mine.derived):
        return None
    derivations = [derivation for derivation, _ in mine.derived]
    if not all(derivation.isometric for derivation in derivations) or not disjoint(derivations):
        return None
    parts = [groups[0] for _, groups in mine.derived]
    if not all(map(mine.rows_are_units, parts)):
        return None
    return torch.stack([uses.rule.squared_norms(uses) for uses in parts]).sum(0)


def _of_a_pair(mine: Gathered) -> Tensor | None:
    """Two rules know a part each, and their inner product: `|a + b|^2 = |a|^2 + 2 a.b + |b|^2`.

    Where the two nearly cancel, this formula loses its digits. There the gradient is formed, for those units alone.
    """
    # A traced graph cannot decide by values which units those are.
    if tracing() or mine.derived or len(mine.direct) != 2 or not all(map(mine.rows_are_units, mine.direct)):
        return None
    # The weighted sum is taken of `mine.direct`, so rows kept in these two would never be used.
    first, second = (Uses(uses.items, allowance=Allowance(0)) for uses in mine.direct)
    found = _inner_products(first, second) or _inner_products(second, first)
    if found is None:
        return None
    inner, size = found
    apart = first.rule.squared_norms(first) + second.rule.squared_norms(second)
    padding = (apart + 2.0 * size) * gram_padding(mine.parameter.shape[-1], inner.dtype, inner.device)
    norms = (apart + 2.0 * inner + padding).clamp(min=0.0)
    close = (padding > NARROW * norms) | (apart > 4.0 * norms)
    for unit in (close & apart.isfinite() & inner.isfinite() & (apart > 0.0)).nonzero()[:, 0].tolist():
        norms[unit] = mine.norms_of(slice(unit, unit + 1))[0]
    return norms


def _of_the_gradients(mine: Gathered) -> Tensor:
    """Every gradient can be formed, a few units at a time: slow, and always right."""
    if not mine.units:
        return wide(mine.parameter).new_zeros(0)
    if mine.siblings is not None:
        return mine.siblings.squared_norms(mine)
    return torch.cat([mine.norms_of(chunk) for chunk in row_chunks(mine.units, mine.bytes_per_unit)])


_WAYS: tuple[Callable[[Gathered], Tensor | None], ...] = (
    _of_the_rule,
    _of_the_parts,
    _of_a_pair,
    _of_the_gradients,
)


def _inner_products(uses: Uses, others: Uses) -> tuple[Tensor, Tensor] | None:  # (B,), (B,)
    """Returns the inner products of two groups' gradients and the sizes of their terms, if their rules know them."""
    factors = others.rule.factors(others)
    return None if factors is None else uses.rule.inner_products(uses, *factors)


# -- from uses to parameters -----------------------------------------------------------------------------------------


def gathered(
    recorded: Recorded, parameters: Mapping[str, nn.Parameter], owner: Owner, *, allowance: Allowance | None = None
) -> dict[str, Gathered]:
    """Returns what was recorded of each parameter that has a use.

    Args:
        recorded: the uses.
        parameters: by name.
        owner: the unit of privacy of each example. Its share is not applied here.
        allowance: what all parameters together may keep from their norms to their sums; by default a fresh one.
    """
    allowance, recorded = allowance or Allowance(), by_owner(recorded, owner)
    found: dict[str, Gathered] = {}
    derived: dict[str, list[tuple[Derivation, list[Uses]]]] = {}
    for derivation, uses in recorded.derived.items():
        groups = _by_rule(uses, allowance)
        for source in derivation.sources:
            derived.setdefault(source, []).append((derivation, groups))
    for name, parameter in parameters.items():
        direct = _by_rule(recorded.direct.get(name, ()), allowance)
        if direct or name in derived:
            found[name] = Gathered(parameter, direct, derived.get(name, []), owner.units)
    if not tracing():
        _bring_together(found)
    return found


def _bring_together(found: Mapping[str, Gathered]) -> None:
    """Finds the parameters that a derived tensor has for itself alone, where there are several of them."""
    alone: dict[Derivation, list[Gathered]] = {}
    for mine in found.values():
        if not mine.direct and len(mine.derived) == 1:
            alone.setdefault(mine.derived[0][0], []).append(mine)
    for derivation, members in alone.items():
        if len(members) > 1:
            siblings = Siblings(derivation, members[0].derived[0][1])
            for member in members:
                siblings.add(member)


def _by_rule(uses: Sequence[Use], allowance: Allowance) -> list[Uses]:
    """Returns the uses in groups that one rule takes at once: of the same rule, with equally many rows."""
    groups: dict[tuple[int, int], list[Use]] = {}
    for use in uses:
        groups.setdefault((id(use.rule), use.rows), []).append(use)
    return [Uses(tuple(group), allowance=allowance) for group in groups.values()]
