"""How a step is computed: what can change its time and memory, and never what is released."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from privet._checks import check_count
from privet.errors import ConfigurationError

__all__ = ["Performance"]


@dataclass(frozen=True)
class Performance:
    """Options of a step that cannot change its guarantee: law 4 says that the result is the same beyond rounding.

    Attributes:
        passes: 1 for the least time; 2 for the least memory, with a second backward of the same forward. `"auto"` is 1,
            but for a sharded model that recomputes its activations, of which one backward would keep as much as if it
            did not, and for one that would keep more than `activation_budget`.
        activation_budget: the most bytes that one backward of a physical batch may keep on each process until the norms
            are known: inputs and output gradients of all layers with trainable parameters. What one example keeps is
            measured when the first batch is checked. Above the budget, steps take two backwards. None for no limit.
        physical_batch_size: the most examples in memory at once; `"auto"` for the largest number that fits, found by
            halving; None for all of the batch. With a number, every tensor of the batch has the examples on axis 0.
        padded: whether every physical batch is filled up to `physical_batch_size` with rows of zeros, which add exactly
            nothing, so that all shapes are fixed. Without a size given, it is a little more than the expected one.
        compile: whether the step is traced as one graph and compiled (`torch.compile`), with padded batches. The first
            steps take long.

    Raises:
        ConfigurationError: for options that are out of range, or that exclude each other.

    Example:
        >>> Performance(passes=2, physical_batch_size=64)
        Performance(passes=2, physical_batch_size=64, padded=False, compile=False, activation_budget=None)
    """

    passes: Literal[1, 2, "auto"] = "auto"
    physical_batch_size: int | Literal["auto"] | None = None
    padded: bool = False
    compile: bool = False
    activation_budget: int | None = None

    def __post_init__(self) -> None:
        if self.passes not in (1, 2, "auto") or isinstance(self.passes, bool):
            raise ConfigurationError(f"passes must be 1, 2 or 'auto', got {self.passes!r}.")
        size: object = self.physical_batch_size
        if isinstance(size, str) and size != "auto":
            raise ConfigurationError(
                f"physical_batch_size must be a whole number of at least 1, or 'auto', got {size!r}."
            )
        if size is not None and size != "auto":
            check_count("physical_batch_size", size, 1)
        if self.activation_budget is not None:
            check_count("activation_budget", self.activation_budget, 1)
            if self.passes != "auto" or self.compile:
                raise ConfigurationError(
                    "activation_budget decides between one and two backwards, which passes or compile=True has decided "
                    "already. Expected one of them. Leave passes at 'auto' and compile at False, or the budget away."
                )
        if self.compile and self.passes == 2:
            raise ConfigurationError("compile=True traces one backward, and passes=2 takes two. Give one of the two.")
        if self.fixed_shapes and size == "auto":
            raise ConfigurationError(
                "physical_batch_size='auto' changes the size of physical batches in mid-run, and padded=True (as with "
                "compile=True) keeps it fixed. Give a number that fits."
            )

    @property
    def fixed_shapes(self) -> bool:
        """Returns whether all physical batches have one size: a compiled graph holds for one shape alone."""
        return self.padded or self.compile

    def physical_size(self, expected: float | None, *, random: bool, ranks: int) -> int | Literal["auto"] | None:
        """Returns the size that was given, or for padded batches one that only one Poisson batch in some forty exceeds.

        It is computed of public numbers alone: the expected size of a logical batch, and whether sizes are random.
        """
        size = self.physical_batch_size
        if size is not None or not self.fixed_shapes or expected is None:
            return size
        spread = 2.0 * math.sqrt(expected) if random else 0.0
        return max(1, math.ceil((expected + spread) / ranks))
