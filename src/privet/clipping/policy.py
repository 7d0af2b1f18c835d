"""What a clipping policy is: from the norms of an example's gradient to its weight in the sum, and a bound on both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from privet.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ClippingPolicy"]


class ClippingPolicy(ABC):
    """Weights such that one example moves the weighted sum by at most `sensitivity`.

    A policy partitions the parameters into K groups and gives every example one weight per group. It is a frozen
    description: what it holds is public knowledge.

    Guarantees expected of an implementation, for every example with finite squared norms `n` (K,):
    `sqrt(sum_k weights_k^2 n_k) <= sensitivity`, with weights finite and not negative. Examples with a norm that is
    not finite are dropped by the caller, whatever their weights.

    A policy of your own is one class in one file (docs/extending/clipping.md). Its weights are checked in every batch.
    """

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """Returns how far one example, added or removed, can move the sum in Euclidean norm."""

    @abstractmethod
    def groups(self, names: Sequence[str]) -> Sequence[int]:
        """Returns the group, from 0 to K - 1, of each parameter."""

    @abstractmethod
    def weights(self, squared_norms: Tensor) -> Tensor:  # (K, B) -> (K, B)
        """Returns every example's weight in each group."""

    def scaled(self, factor: float) -> ClippingPolicy:
        """Returns the same policy with all clip norms times `factor`, for a schedule of the clip norm.

        A policy that has no clip norm to change leaves this as it is.

        Raises:
            ConfigurationError: if there is no such policy.
        """
        raise ConfigurationError(
            f"{type(self).__name__} has no clip norm that a schedule could change. Expected a policy with a method "
            "scaled(factor), such as Flat or PerLayer."
        )
