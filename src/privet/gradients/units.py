"""The rows of one group of uses, brought to units of privacy: their gradients, their rounding errors, their weights.

Axes: B units (examples, or their owners), R rows of a use: several, next to each other, may belong to one unit.
"""

from __future__ import annotations

from torch import Tensor

from privet.gradients.precision import product_error
from privet.gradients.use import Uses

__all__ = ["of_rows", "rows_are_units", "unit_rounding", "unit_rows"]


def rows_are_units(units: int, uses: Uses) -> bool:
    """Returns whether row i of each use is the only row of unit i."""
    return all(use.rows == units for use in uses)


def of_rows(units: int, uses: Uses, values: Tensor) -> Tensor:  # (B,) -> (R,)
    """Returns the value of each row's unit."""
    repeat = uses.rows // units if units else 1
    return values if repeat == 1 else values.repeat_interleave(repeat)


def unit_rows(units: int, uses: Uses, chosen: slice) -> Tensor:  # (B', *shape)
    """Returns the gradients of some units, instantiated."""
    part, repeat = _narrowed(units, uses, chosen)
    rows = part.rule.per_example(part)
    return rows if repeat == 1 else rows.view(-1, repeat, *rows.shape[1:]).sum(1)


def unit_rounding(units: int, uses: Uses, chosen: slice) -> Tensor | None:  # (B',)
    """Returns the rounding errors of some units' gradients, where there is something to say of them."""
    part, repeat = _narrowed(units, uses, chosen)
    rounding = part.rule.rounding(part)
    if repeat > 1:  # rows of one unit may cancel, and the weighted sum adds them up in another order
        sizes = part.rule.squared_norms(part).sqrt()
        added = sizes * product_error(repeat, sizes.dtype, sizes.device)
        rounding = added if rounding is None else rounding + added
    return None if rounding is None else rounding.view(-1, repeat).sum(1)


def _narrowed(units: int, uses: Uses, chosen: slice) -> tuple[Uses, int]:
    """Returns the uses of some units alone, and how many rows each unit has."""
    repeat = uses.rows // units
    return uses.narrowed(chosen.start * repeat, chosen.stop * repeat), repeat
