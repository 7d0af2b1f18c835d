"""A tensor derived from parameters, its uses, and what of their gradients goes back to each parameter.

Every parameter that the tensor comes from needs the gradients of its units: for a norm, and for the weighted sum. They
are formed once, as far as the allowance goes, and go back to all of the parameters in one call.

Axes: B units of privacy (examples, or their owners).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from privet.gradients.derived import Derivation, pull_back, pull_back_rows, pulled_back
from privet.gradients.precision import product_error
from privet.gradients.rows import padded, row_norms, summed, weighted_rows
from privet.gradients.rules.strategy import ROWS_BYTES, row_chunks
from privet.gradients.units import of_rows, unit_rounding, unit_rows
from privet.gradients.use import Uses
from privet.gradients.weight_norm import weight_norm_norms

__all__ = ["Branch"]


class Branch:
    """One derived tensor with all of its uses.

    Args:
        derivation: of the tensor.
        groups: its uses, those of one rule together.
        units: B.
    """

    def __init__(self, derivation: Derivation, groups: Sequence[Uses], units: int) -> None:
        self.derivation = derivation
        self.groups = groups
        self._units = units
        self._rows: Tensor | None = None  # (B, *derived): of all units, if they are kept
        self._alone: list[Tensor] = []  # parameters without any other use
        self._others: list[Tensor] = []
        self._norms: dict[int, Tensor] = {}
        self._back: dict[int, Tensor] = {}  # (B, *shape): of the others, as far as they are kept
        self._went_back = False
        self._weights: Tensor | None = None
        self._sums: dict[int, Tensor] = {}

    def join(self, parameter: Tensor, *, alone: bool) -> None:
        """Adds a parameter that the tensor comes from, whose gradients go back together with those of all that joined.

        Args:
            parameter: not added before.
            alone: whether it has no use but through this tensor.
        """
        (self._alone if alone else self._others).append(parameter)

    def knows_norms_of(self, parameter: Tensor) -> bool:
        """Returns whether the norms of a parameter are those of what goes back to it from here."""
        return any(parameter is each for each in self._alone)

    @property
    def _bytes(self) -> int:
        """Returns how many bytes an entry of a gradient takes."""
        return max(4, self.derivation.tensor.element_size())

    # -- of the derived tensor ---------------------------------------------------------------------------------------

    def rows(self, units: slice) -> Tensor:  # (B', *derived)
        """Returns the gradients of some units with respect to the tensor."""
        if self._rows is not None:
            return self._rows[units]
        return summed([unit_rows(self._units, uses, units) for uses in self.groups])

    def keep(self) -> None:
        """Forms the gradients of all units and keeps them for what follows, if the allowance permits."""
        size = self._bytes * self._units * self.derivation.tensor.numel()
        allowance = self.groups[0].allowance
        if self._rows is None and self._units and size <= min(ROWS_BYTES, allowance.left):
            self._rows = self.rows(slice(0, self._units))
            allowance.left -= self._rows.numel() * self._rows.element_size()

    def rounding(self, units: slice) -> Tensor | None:  # (B',)
        """Returns a bound on how far the weighted sum's terms are from the gradients whose norms are taken, or None.

        Where the rows are kept it is a sum of these very rows. What goes back is rounded all the same.
        """
        if self._rows is not None:
            rows = self._rows[units]
            terms = self.derivation.tensor.numel()
            return row_norms(rows).sqrt() * product_error(terms, rows.dtype, rows.device)
        found = [r for uses in self.groups if (r := unit_rounding(self._units, uses, units)) is not None]
        return summed(found) if found else None

    def sum(self, weights: Tensor) -> Tensor:  # (B,) -> derived shape
        """Returns the weighted sum of the units' gradients with respect to the tensor."""
        if self._rows is not None:
            return weighted_rows(self._rows, weights)
        parts = [u.rule.weighted_sum(u, of_rows(self._units, u, weights)) for u in self.groups]
        return summed(parts)

    # -- of the parameters -------------------------------------------------------------------------------------------

    def norms_of(self, parameter: Tensor) -> Tensor:  # (B,)
        """Returns the squared norms of a parameter without any other use; all of them are found at once."""
        if not self._went_back:
            self._go_back()
        return self._norms[id(parameter)]

    def rows_of(self, parameter: Tensor, units: slice) -> Tensor:  # (B', *shape)
        """Returns the part of some units' gradients of a parameter that comes from here: to be read, not written."""
        if not self._went_back and any(parameter is each for each in self._others):
            self._go_back()
        kept = self._back.get(id(parameter))
        return self.fresh_rows_of(parameter, units) if kept is None else kept[units]

    def fresh_rows_of(self, parameter: Tensor, units: slice) -> Tensor:  # (B', *shape)
        """Returns the same, of which nothing is kept."""
        return pull_back_rows(self.derivation, [parameter], self.rows(units))[0]

    def _go_back(self) -> None:
        """Takes the gradients back to all that joined: it finds the norms of those alone, and keeps rows of others."""
        self.keep()
        self._went_back = True
        allowance = self.groups[0].allowance
        size = self._bytes * self._units * sum(p.numel() for p in self._others)
        others = self._others if size <= min(ROWS_BYTES, allowance.left) else []
        allowance.left -= size if others else 0
        parameters = [*self._alone, *others]
        entries = self.derivation.tensor.numel() + sum(p.numel() for p in parameters)
        norms: list[list[Tensor]] = [[] for _ in self._alone]
        kept: list[list[Tensor]] = [[] for _ in others]
        for chunk in row_chunks(self._units, self._bytes * entries):
            rows = self.rows(chunk)
            found = None if others else weight_norm_norms(self.derivation, parameters, rows)
            # Those norms are padded for the way back, which is all that is rounded where the rows are kept.
            rounding = self.rounding(chunk) if found is None or self._rows is None else None
            if found is None:
                of_chunk = []
                for back in pulled_back(self.derivation, parameters, rows):
                    of_chunk.append([row_norms(each) for each in back[: len(norms)]])
                    for parts, each in zip(kept, back[len(norms) :], strict=True):
                        parts.append(each)
                found = [torch.cat(each) for each in zip(*of_chunk, strict=True)]
            for parts, each in zip(norms, found, strict=True):
                parts.append(each if rounding is None else padded(each, rounding))
        self._norms = {id(p): torch.cat(parts) for p, parts in zip(self._alone, norms, strict=True)}
        self._back = {id(p): torch.cat(parts) for p, parts in zip(others, kept, strict=True)}

    def weighted_sum(self, parameter: Tensor, weights: Tensor) -> Tensor:  # (B,) -> shape
        """Returns the weighted sum of what goes back to a parameter; sums of all that joined are formed at once.

        The way back is linear: the sum goes back, and not each unit's gradient.
        """
        joined = [*self._alone, *self._others]
        if not any(parameter is each for each in joined):
            return pull_back(self.derivation, [parameter], self.sum(weights))[0]
        same = self._weights is not None and self._weights.data_ptr() == weights.data_ptr()
        if not same or id(parameter) not in self._sums:
            sums = pull_back(self.derivation, joined, self.sum(weights))
            self._weights, self._sums = weights, {id(p): s for p, s in zip(joined, sums, strict=True)}
        return self._sums.pop(id(parameter))

    def masked(self, dropped: Tensor) -> Branch:  # (B,) bool
        """Returns the same without any value of the dropped units; nothing goes back together from there."""
        groups = [uses.masked(of_rows(self._units, uses, dropped)) for uses in self.groups]
        found = Branch(self.derivation, groups, self._units)
        if self._rows is not None:
            found._rows = self._rows.masked_fill(dropped.view(-1, *[1] * (self._rows.dim() - 1)), 0)
        return found
