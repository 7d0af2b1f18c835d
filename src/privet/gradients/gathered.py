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

from privet.gradients.branch import Branch
from privet.gradients.by_owner import by_owner
from privet.gradients.derived import disjoint
from privet.gradients.rows import padded, row_norms, summed, wide
from privet.gradients.rules.gram import NARROW, gram_padding
from privet.gradients.rules.strategy import row_chunks
from privet.gradients.tracing import tracing
from privet.gradients.units import of_rows, rows_are_units, unit_rounding, unit_rows
from privet.gradients.use import Allowance, Owner, Recorded, Use, Uses

__all__ = ["Gathered", "gathered"]


@dataclass(eq=False)
class Gathered:
    """All that one backward recorded of one parameter."""

    parameter: Tensor
    direct: list[Uses]
    branches: list[Branch]  # through tensors derived from it
    units: int  # B

    def rows_are_units(self, uses: Uses) -> bool:
        """Returns whether row i of each use is the only row of unit i."""
        return rows_are_units(self.units, uses)

    def squared_norms(self) -> Tensor:  # (B,)
        """Returns the squared norm of each unit's gradient."""
        for way in _WAYS:
            norms = way(self)
            if norms is not None:
                return norms
        raise AssertionError("the last way knows all norms")

    def per_unit(self, units: slice) -> Tensor:  # (B', *shape)
        """Returns the gradients of some units, instantiated."""
        terms = [unit_rows(self.units, uses, units) for uses in self.direct]
        return summed(terms + [branch.fresh_rows_of(self.parameter, units) for branch in self.branches])

    @property
    def bytes_per_unit(self) -> int:
        """Returns about how much memory one unit's gradient takes, on its way back from derived tensors included."""
        return 4 * max([self.parameter.numel(), *(branch.derivation.tensor.numel() for branch in self.branches)])

    def norms_of(self, units: slice) -> Tensor:  # (B',)
        """Returns the squared norms of some units' gradients, instantiated.

        The weighted sum will be formed by the rules, from their own factors. So each norm is padded for what the two
        are rounded differently.
        """
        terms = [unit_rows(self.units, uses, units) for uses in self.direct]
        norms = row_norms(summed(terms + [branch.rows_of(self.parameter, units) for branch in self.branches]))
        errors = [unit_rounding(self.units, uses, units) for uses in self.direct]
        errors += [branch.rounding(units) for branch in self.branches]
        known = [error for error in errors if error is not None]
        return padded(norms, summed(known)) if known else norms

    def weighted_sum(self, weights: Tensor) -> Tensor:  # (B,) -> shape
        """Returns the weighted sum of the units' gradients."""
        terms = [uses.rule.weighted_sum(uses, of_rows(self.units, uses, weights)) for uses in self.direct]
        return summed(terms + [branch.weighted_sum(self.parameter, weights) for branch in self.branches])

    def masked(self, dropped: Tensor) -> Gathered:  # (B,) bool
        """Returns the same without any value of the dropped units."""
        direct = [uses.masked(of_rows(self.units, uses, dropped)) for uses in self.direct]
        return Gathered(self.parameter, direct, [branch.masked(dropped) for branch in self.branches], self.units)


# -- ways to the norms -----------------------------------------------------------------------------------------------


def _of_the_rule(mine: Gathered) -> Tensor | None:
    """One rule knows all uses, and each row is a unit: the rule's own formula is the cheapest there is."""
    if len(mine.direct) != 1 or mine.branches or not mine.rows_are_units(mine.direct[0]):
        return None
    return mine.direct[0].rule.squared_norms(mine.direct[0])


def _of_the_parts(mine: Gathered) -> Tensor | None:
    """The uses are of parts of the parameter that never overlap, moved but not changed: their squared norms add up."""
    if mine.direct or any(len(branch.groups) != 1 for branch in mine.branches):
        return None
    derivations = [branch.derivation for branch in mine.branches]
    if not all(derivation.isometric for derivation in derivations) or not disjoint(derivations):
        return None
    parts = [branch.groups[0] for branch in mine.branches]
    if not all(map(mine.rows_are_units, parts)):
        return None
    return torch.stack([uses.rule.squared_norms(uses) for uses in parts]).sum(0)


def _of_a_pair(mine: Gathered) -> Tensor | None:
    """Two rules know a part each, and their inner product: `|a + b|^2 = |a|^2 + 2 a.b + |b|^2`.

    Where the two nearly cancel, this formula loses its digits. There the gradient is formed, for those units alone.
    """
    # A traced graph cannot decide by values which units those are.
    if tracing() or mine.branches or len(mine.direct) != 2 or not all(map(mine.rows_are_units, mine.direct)):
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
    if len(mine.branches) == 1 and mine.branches[0].knows_norms_of(mine.parameter):
        return mine.branches[0].norms_of(mine.parameter)
    if mine.branches and not tracing():
        for branch in mine.branches:
            branch.keep()
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
    branches: dict[str, list[Branch]] = {}
    for derivation, uses in recorded.derived.items():
        branch = Branch(derivation, _by_rule(uses, allowance), owner.units)
        for source in derivation.sources:
            branches.setdefault(source, []).append(branch)
    for name, parameter in parameters.items():
        direct = _by_rule(recorded.direct.get(name, ()), allowance)
        if direct or name in branches:
            found[name] = Gathered(parameter, direct, branches.get(name, []), owner.units)
    if not tracing():
        _bring_together(found)
    return found


def _bring_together(found: Mapping[str, Gathered]) -> None:
    """Finds the parameters that one derived tensor comes from, where there are several: one call goes back to all."""
    members: dict[Branch, list[Gathered]] = {}
    for mine in found.values():
        for branch in mine.branches:
            members.setdefault(branch, []).append(mine)
    for branch, together in members.items():
        for mine in together if len(together) > 1 else ():
            branch.join(mine.parameter, alone=not mine.direct and len(mine.branches) == 1)


def _by_rule(uses: Sequence[Use], allowance: Allowance) -> list[Uses]:
    """Returns the uses in groups that one rule takes at once: of the same rule, with equally many rows."""
    groups: dict[tuple[int, int], list[Use]] = {}
    for use in uses:
        groups.setdefault((id(use.rule), use.rows), []).append(use)
    return [Uses(tuple(group), allowance=allowance) for group in groups.values()]
