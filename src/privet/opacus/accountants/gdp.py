"""The accountant by Gaussian differential privacy."""

from __future__ import annotations

from privet.accounting import GdpAccountant
from privet.opacus.accountants.accountant import StepAccountant
from privet.opacus.warning import warn

__all__ = ["GaussianAccountant"]


class GaussianAccountant(StepAccountant):
    """ε by the smallest Gaussian that covers the whole curve of the history, never by the central limit theorem."""

    def __init__(self) -> None:
        super().__init__()
        self._core = GdpAccountant()
        self._told = False

    def get_epsilon(self, delta: float, poisson: bool = True) -> float:  # noqa: FBT001, FBT002 - Opacus's signature
        """Returns an upper bound on ε at `delta`."""
        if not self._told and any(rate < 1.0 for _, rate, _ in self.history):
            self._told = True
            warn(
                "Opacus takes the central limit for the accountant 'gdp', which reports less than the true ε. Here "
                "the figure is an upper bound, and so larger. The accountant 'prv' gives the smallest honest figure."
            )
        return self._epsilon(self._core, delta)

    @classmethod
    def mechanism(cls) -> str:
        """Returns "gdp"."""
        return "gdp"
