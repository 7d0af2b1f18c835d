"""Per-example gradients that are given, whatever they came from: as a use of an operation that is never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from privet.gradients.rows import summed, wide
from privet.gradients.use import Operation, Rule, Use, Uses

__all__ = ["added_up", "given"]


class _GivenRule(Rule):
    """The rows are the gradients."""

    def per_example(self, uses: Uses) -> Tensor:
        return summed([wide(use.gradient) for use in uses])


class _Given(Operation):
    """Stands for whatever per-example gradients came from. It is never run."""

    rules: Mapping[str, Rule] = {"rows": _GivenRule()}

    def forward(self, data: Sequence[Tensor], values: Mapping[str, Tensor]) -> Any:
        """Raises: the gradients are there already."""
        raise AssertionError("the gradients were given: there is no forward to run")

    def data_gradients(
        self, data: Sequence[Tensor], values: Mapping[str, Tensor], gradient: Any, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Raises: the gradients are there already."""
        raise AssertionError("the gradients were given: there is no backward to run")


_GIVEN = _Given()


def given(rows: Tensor, shape: tuple[int, ...]) -> Use:  # (R, *shape)
    """Returns a use of a parameter whose per-example gradients are the rows."""
    return Use(_GIVEN, "rows", (), rows, shape)


def added_up(use: Use, add_up: Callable[[Tensor], Tensor]) -> Use:
    """Returns a use whose rows are the sums over processes, each of which met a part of every example.

    The norm of a sum is not known from the norms of its terms. So the rows are added up before any norm is taken.
    """
    return given(add_up(use.rule.per_example(Uses((use,)))), use.shape)
