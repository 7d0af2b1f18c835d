"""A noise source with a memory: at step t it adds (C⁻¹ Z)_t, for the matrix C of one correlated noise.

Z has one independent row of standard normal values for each step, drawn from an addressed source. C is lower
triangular, so that row t of C⁻¹ Z is made of rows 0 to t of Z, and there are two ways to it:

    way              kept                                         drawn in step t of a correlation
    drawn again      nothing                                      each earlier row whose weight in C⁻¹ is not 0
    buffers          bands - 1 buffers, or one for each decay     one row

Guarantees
----------
A row of Z meets the sums that C⁻¹ says, each with its own weight, and no others. A row is never used for two sums at
the same step, nor for sums of two correlations.

    case                                         result
    a gap in the numbers of the steps            the correlation begins anew: C is block diagonal, and nowhere larger
    a fresh key, as after a resume or a fork     the correlation begins anew
    a reproducible key                           the rows since the correlation began are drawn again: the same bits
    std = 0                                      nothing is drawn; the next step begins anew
    an error midway                              the buffers are dropped; the next step begins anew
    a copy, a pickle, a saved state              has no buffers: they are secret
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from privet._checks import check_count
from privet.accounting.toeplitz import Toeplitz
from privet.errors import ConfigurationError
from privet.noise.counter import CounterNoise, Offsets

__all__ = ["CorrelatedSource", "inverse_column"]

_AT_ONCE = 1 << 22  # elements whose noise of a step is held beside the buffers
Named = list[tuple[str, Tensor]]


def inverse_column(matrix: Toeplitz, steps: int) -> list[float]:
    """Returns the first column of C⁻¹ of so many steps, C having a first column of norm 1."""
    norm, column = np.sqrt(matrix.squared_norm), matrix.column(steps)
    if len(matrix.decays) == 1 and matrix.scales == matrix.decays:  # powers of one number: exactly two entries
        return [norm, -norm * matrix.decays[0], *[0.0] * (steps - 2)][:steps]
    reach = steps if matrix.bands is None else matrix.bands
    found = np.zeros(steps)
    for index in range(steps):
        least = max(0, index - reach + 1)
        past = found[least:index] @ column[index - least : 0 : -1]
        found[index] = ((index == 0) - past) / column[0]
    return (norm * found).tolist()  # type: ignore[no-any-return]


@final
class CorrelatedSource:
    """Adds correlated noise of unit norm: multiplied by the standard deviation of the step's own independent noise.

    Args:
        inner: draws the independent rows; nothing else may use it.
        matrix: C, up to a factor: its first column is taken to have norm 1.
        most_bytes: the most that buffers may take in this process. Where they would take more, and where C⁻¹ has two
            diagonals, noise is drawn again. By default there is no limit.
    """

    def __init__(self, inner: CounterNoise, matrix: Toeplitz, *, most_bytes: int | None = None) -> None:
        self._inner = inner
        self._matrix = matrix
        self._most_bytes = most_bytes
        self._norm = float(np.sqrt(matrix.squared_norm))
        self._two_diagonals = len(matrix.decays) == 1 and matrix.scales == matrix.decays
        self._weights: list[float] = []  # of C⁻¹, as far as they were needed
        self._generation = inner.key.generation
        self._began: int | None = None  # the step that the correlation at hand began with
        self._last = -1
        self._kept: _Buffers | None = None

    @property
    def secure(self) -> bool:
        """Returns whether the values are cryptographically unpredictable."""
        return self._inner.secure

    @property
    def predictable(self) -> bool:
        """Returns whether the run is reproducible, and so not private."""
        return self._inner.predictable

    @property
    def buffers(self) -> int:
        """Returns how many buffers are held for each element now."""
        return 0 if self._kept is None else len(self._kept.rows)

    def begin_anew(self) -> None:
        """Ends the correlation: the noise of the next step is independent of all before it."""
        self._began, self._kept = None, None

    def add_many(
        self, tensors: Iterable[tuple[str, Tensor]], *, std: float, step: int, offsets: Offsets | None = None
    ) -> None:
        """Adds `std` times row `step` of C⁻¹ Z to every named tensor; `offsets` say where shards lie."""
        named = [(name, tensor.detach()) for name, tensor in tensors]
        self._inner.add_many(named, std=0.0, step=step, offsets=offsets)  # refuses what cannot be added to
        self._follow(step)
        if std == 0.0:
            self.begin_anew()
            return
        began, kept = step if self._began is None else self._began, self._kept
        self.begin_anew()  # until all has been added: an error ends the correlation
        if self._draws_again(named):
            self._add_drawn(named, std, step - began, step, offsets)
            kept = None
        else:
            if kept is None or not kept.fit(named):
                kept = _Buffers(self._matrix, named)
            self._add_kept(kept, named, std, began=began, step=step, offsets=offsets)
        self._began, self._kept = began, kept

    def _follow(self, step: int) -> None:
        """Begins anew where the step does not follow the last one, or its rows would be of another key."""
        generation, before = self._inner.key.generation, self._generation
        self._generation = generation
        if generation != before:
            self._kept = None
            if not self.predictable:
                self.begin_anew()
        if step != self._last + 1:
            self.begin_anew()
        self._last = step

    def _draws_again(self, named: Named) -> bool:
        if self._two_diagonals or self._most_bytes is None:
            return self._two_diagonals
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in named)
        return size * _buffers_of(self._matrix) > self._most_bytes

    # -- drawn again -------------------------------------------------------------------------------------------------

    def _add_drawn(self, named: Named, std: float, age: int, step: int, offsets: Offsets | None) -> None:
        if age >= len(self._weights):
            self._weights = inverse_column(self._matrix, 2 * (age + 1))
        weights = self._weights[: age + 1]
        values = [tensor for _, tensor in named]
        for lag, weight in enumerate(weights):
            if weight > 0.0:
                self._inner.add_many(named, std=std * weight, step=step - lag, offsets=offsets)
        if not any(weight < 0.0 for weight in weights):
            return
        torch._foreach_neg_(values)  # -(-y + n) is y - n, bit by bit: a row with a negative weight needs no buffer
        for lag, weight in enumerate(weights):
            if weight < 0.0:
                self._inner.add_many(named, std=-std * weight, step=step - lag, offsets=offsets)
        torch._foreach_neg_(values)

    # -- buffers -----------------------------------------------------------------------------------------------------

    def _add_kept(
        self, kept: _Buffers, named: Named, std: float, *, began: int, step: int, offsets: Offsets | None
    ) -> None:
        for group in _groups(named):
            for earlier in range(began + kept.age, step):  # only where the buffers were lost
                kept.advance(group, self._inner, step=earlier, age=earlier - began, offsets=offsets)
            rows = kept.advance(group, self._inner, step=step, age=step - began, offsets=offsets)
            torch._foreach_add_([tensor for _, tensor in group], rows, alpha=std * self._norm)
        kept.age = step - began + 1

    # -- to and from a checkpoint ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: neither a key nor a buffer."""
        return {"independent": self._inner.state_dict(), "began": self._began, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes: a reproducible run goes on with its correlation, any other begins a new one under a fresh key."""
        if not {"independent", "began", "last"} <= set(state):
            raise ConfigurationError(
                "the state was saved by a run whose noise was not correlated. Expected the noise of the saved run. "
                "Build the mechanism with the same noise."
            )
        last = check_count("last", state["last"], least=-1)
        self._inner.load_state_dict(state["independent"])
        self.begin_anew()
        self._last = last
        if self.predictable:
            self._began = state["began"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _buffers_of(matrix: Toeplitz) -> int:
    """Returns how many buffers the recursion of a matrix needs for each element."""
    return len(matrix.decays) if matrix.bands is None else matrix.bands - 1


def _groups(named: Named) -> Iterable[Named]:
    """Yields the tensors in groups of some elements, so that what is held beside the buffers stays small."""
    group: Named = []
    for one in named:
        if group and sum(tensor.numel() for _, tensor in [*group, one]) > _AT_ONCE:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


class _Buffers:
    """What is kept of earlier rows of C⁻¹ Z, for every element that this process holds.

    With bands, `rows` is a ring of the last rows x of C⁻¹ Z: c_0 x_t = z_t - Σ_i c_i x_(t-i). With decays there is a
    row for each: x = z - Σ_j s_j row_j, and then row_j becomes λ_j row_j + x (McMahan et al., arXiv 2404.16706).
    Both are for a first column that begins as the matrix says, whatever its norm.
    """

    def __init__(self, matrix: Toeplitz, named: Named) -> None:
        self._matrix = matrix
        self._kinds = {name: _kind(tensor) for name, tensor in named}
        self.rows: list[dict[str, Tensor]] = [
            {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) for name, tensor in named}
            for _ in range(_buffers_of(matrix))
        ]
        self.age = 0  # steps of the correlation that the rows have seen

    def fit(self, named: Named) -> bool:
        """Returns whether the rows are of these tensors."""
        return self._kinds == {name: _kind(tensor) for name, tensor in named}

    def advance(
        self, group: Named, draw: CounterNoise, *, step: int, age: int, offsets: Offsets | None
    ) -> list[Tensor]:
        """Takes the rows of some tensors one step further, and returns the row of C⁻¹ Z of that step."""
        names = [name for name, _ in group]
        rows = [[row[name] for name in names] for row in self.rows]
        column = self._matrix.coefficients
        if not rows:
            found = [torch.zeros_like(tensor) for _, tensor in group]
            draw.add_many(zip(names, found, strict=True), std=1.0 / column[0], step=step, offsets=offsets)
        elif self._matrix.decays:
            found = [torch.zeros_like(row) for row in rows[0]]
            draw.add_many(zip(names, found, strict=True), std=1.0, step=step, offsets=offsets)
            for row, scale in zip(rows, self._matrix.scales, strict=True):
                torch._foreach_add_(found, row, alpha=-scale)
            for row, decay in zip(rows, self._matrix.decays, strict=True):
                torch._foreach_mul_(row, decay)
                torch._foreach_add_(row, found)
        else:
            found = rows[age % len(rows)]  # the oldest row makes place for the new one
            torch._foreach_mul_(found, -column[-1])
            draw.add_many(zip(names, found, strict=True), std=1.0, step=step, offsets=offsets)
            for lag in range(1, min(len(rows), age + 1)):
                torch._foreach_add_(found, rows[(age - lag) % len(rows)], alpha=-column[lag])
            torch._foreach_div_(found, column[0])
        return found


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
