"""The discrete Gaussian law N_Z(0, s²) in integer arithmetic, cut into strips of equal width.

|Y| = 2^b k + x has k for its strip and x in {0, ..., 2^b - 1} within it. With r = 2^b / s,

    P(strip k proposed)  proportional to  q_k = e^(-k² r² / 2)
    P(k, x accepted)     =  e^(-E),  E = x (2^(b+1) k + x) / 2s²,   at most (2k + 1) r² / 2

so that a sign, a strip and x that are accepted have the law (Karney, ACM Trans. Math. Softw. 42, 2016, has strips as
wide as s). Widths are powers of two with r between 2^-9 and 2^-8, or 1 for small s. So x is made of bits alone, and
about one proposal in a thousand is rejected.

Everything real here is an integer times 2^-P whose error is known. What P digits do not decide is decided by more.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_TAIL", "DiscreteLaw", "Tables", "Tails", "cells_of", "exponential"]

LEAST_TAIL = 2**20
"""Of 2^63: strips of a smaller tail are not in the tables for many draws at once, but found one by one."""

_STRIPS = 9
_GUARD = 96  # digits beyond P, which hold all errors of the sums below
_MANTISSA = 10  # of the logarithm by which a strip is looked up


def exponential(numerator: int, denominator: int, digits: int) -> int:
    """Returns e^(-numerator/denominator) in units of 2^-digits, within `digits` + 8 units; of a share of at most 1."""
    assert 0 <= numerator <= denominator
    total = term = 1 << digits
    index = 0
    while term:
        index += 1
        term = term * numerator // (denominator * index)
        total += -term if index % 2 else term
    return total


@dataclass(frozen=True)
class Tails:
    """R_j = P(strip > j) for j = 0, 1, ..., in units of 2^-digits, each within `error` units."""

    digits: int
    error: int
    values: tuple[int, ...]  # falling; beyond the last one R is less than `error`

    def strip(self, drawn: int, bits: int) -> int | None:
        """Returns how many R_j are above a uniform number whose first `bits` are `drawn`; None if more are needed."""
        low, high = drawn << self.digits - bits, (drawn + 1) << self.digits - bits
        sure = self._above(high + self.error)
        if low < 2 * self.error or self._above(low - self.error + 1) != sure:
            return None
        return sure

    def whole(self) -> list[int] | None:
        """Returns the whole parts of 2^63 R_j from `LEAST_TAIL` on, or None if the error hides one of them."""
        shift, found = self.digits - 63, []
        for value in self.values:
            part = value + self.error >> shift
            if part < LEAST_TAIL:
                break
            if part != value - self.error >> shift:
                return None
            found.append(part)
        return found

    def _above(self, least: int) -> int:
        """Returns how many of the values are at least `least`."""
        return bisect.bisect_right(self.values, -least, key=lambda value: -value)


@dataclass(frozen=True)
class Tables:
    """What many strips are looked up by at once, from uniform numbers v of 63 bits.

    Attributes:
        tails: the whole parts of 2^63 R_j, down to `LEAST_TAIL`; and a last 0.
        guide: for each cell of the logarithm of v, how many tails are above all of the cell.
        first_cell: the number of the first of these cells.
        most: how many tails a cell holds at most.
    """

    tails: NDArray[np.int64]
    guide: NDArray[np.int64]
    first_cell: int
    most: int


class DiscreteLaw:
    """N_Z(0, s²) for a whole s of at least 1.

    Args:
        scale: s.
    """

    def __init__(self, scale: int) -> None:
        assert scale >= 1
        self.scale = scale
        self._exact: dict[int, Tails] = {}
        self.width_bits = max(0, scale.bit_length() - _STRIPS)
        self.tables = self._tables()
        strips, square = len(self.tables.tails), 2 * scale**2
        # 1 - E is at most e^-E: below this share of all numbers, whatever the strip, a proposal is accepted.
        most = (2 * strips + 1) << 2 * self.width_bits if self.width_bits else 0
        self.accept_bits = 63 - self.width_bits
        self.sure = min(((square - most) << self.accept_bits) // square, 2**63 - 1)

    def exact_tails(self, digits: int) -> Tails:
        """Returns R_j with at least so many binary digits."""
        found = self._exact.get(digits)
        if found is None:
            found = self._exact[digits] = self._summed(digits + _GUARD)
        return found

    def _summed(self, precision: int) -> Tails:
        numerator, denominator = 1 << 2 * self.width_bits, 2 * self.scale**2
        # q_(k+1) = q_k g_(k+1), g_(k+1) = g_k e^(-r²), g_1 = e^(-r²/2).
        ratio = exponential(numerator, denominator, precision)
        falling = exponential(2 * numerator, denominator, precision)
        weights = [1 << precision]
        while weights[-1]:
            weights.append(weights[-1] * ratio >> precision)
            ratio = ratio * falling >> precision
        count = len(weights)
        # Each product loses a unit, and what its factors had lost: g_k at most k (P + 9) units, q_k k² (P + 10), all q
        # together k³ (P + 10). What comes after the last weight is less than 2^9 times the error of that one.
        error = 4 * (count + 512) ** 3 * (precision + 9)
        assert error < 1 << _GUARD - 8
        total, above, values = sum(weights), 0, []
        for weight in reversed(weights[1:]):
            above += weight
            values.append((above << precision) // total)
        return Tails(precision, 2 * error + 1, tuple(reversed(values)))

    def _tables(self) -> Tables:
        """Returns the tables, whose whole parts are exact."""
        digits, whole = 192, None
        while whole is None:
            whole = self.exact_tails(digits).whole()
            digits *= 2
        found = np.array([*whole, 0], dtype=np.int64)
        first = int(cells_of(np.array([LEAST_TAIL]))[0])
        count = int(cells_of(np.array([2**63 - 1]))[0]) - first + 1
        inside = np.bincount(cells_of(found[:-1]) - first, minlength=count)
        in_higher_cells = len(whole) - np.cumsum(inside)
        return Tables(found, in_higher_cells.astype(np.int64), first, int(inside.max()))


def cells_of(drawn: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns a number for each of `drawn` that never falls where they grow: about 1024 for each power of two."""
    return (drawn.astype(np.float64) + 1.0).view(np.int64) >> 52 - _MANTISSA
