"""The clipped sum of per-example gradients: a secret, and how far one example can move it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from privet.errors import ProtocolError

__all__ = ["ClippedSum"]


@dataclass(eq=False)
class ClippedSum:
    """Sums by parameter name, not yet private. Only `privet.noise` turns one into a private gradient, and only once.

    Attributes:
        sensitivity: the Euclidean distance by which one example, added or removed, can move `values` as a whole.
        statistics: secret counts that a policy or a report may want, such as how many examples were dropped because
            their norm was not finite, and values of each example, which are on the last axis. Tensors on the device;
            nothing here may be shown without noise.
    """

    values: Mapping[str, Tensor] = field(repr=False)
    sensitivity: float
    statistics: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    released: bool = field(default=False, init=False)

    def take(self) -> Mapping[str, Tensor]:
        """Returns the values to the one who adds the noise, and lets go of them.

        Raises:
            ProtocolError: if they were taken before: two noises on one sum would average out.
        """
        if self.released:
            raise ProtocolError("this clipped sum was released before. Expected one release for each sum.")
        self.released = True
        values, self.values = self.values, {}
        return values

    def of_first(self, examples: int) -> ClippedSum:
        """Returns the sum, with the statistics of its first examples alone: those after them only filled up."""
        self.statistics = {key: t[..., :examples] if t.dim() else t for key, t in self.statistics.items()}
        return self

    def add(self, other: ClippedSum) -> ClippedSum:
        """Returns the sum of two physical batches of one logical batch, of which each example is in one alone.

        Raises:
            ProtocolError: if the two were clipped differently, or are of different parameters.
        """
        if self.sensitivity != other.sensitivity or set(self.values) != set(other.values):
            raise ProtocolError(
                f"cannot add clipped sums of sensitivities {self.sensitivity} and {other.sensitivity} over "
                f"{len(self.values)} and {len(other.values)} parameters. Expected one policy within a logical batch."
            )
        theirs = other.take()
        for name, value in self.values.items():
            value.add_(theirs[name])
        self.statistics = {
            key: torch.cat([mine, other.statistics[key]], dim=-1) if mine.dim() else mine + other.statistics[key]
            for key, mine in self.statistics.items()
        }
        return self
