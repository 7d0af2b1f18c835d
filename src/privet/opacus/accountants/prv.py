"""The accountant by numerical composition of privacy losses, the tightest."""

from __future__ import annotations

from privet.accounting import PldAccountant
from privet.opacus.accountants.accountant import StepAccountant

__all__ = ["PRVAccountant"]


class PRVAccountant(StepAccountant):
    """ε by composing the privacy losses of all steps numerically. It is an upper bound, to its last digit."""

    def __init__(self) -> None:
        super().__init__()
        self._core = PldAccountant()

    def get_epsilon(self, delta: float, *, eps_error: float = 0.01, delta_error: float | None = None) -> float:
        """Returns an upper bound on ε at `delta`.

        Args:
            delta: above 0, well below 1 over the number of examples.
            eps_error: kept for scripts that give it: the bound here is as sharp as it can be, whatever it is.
            delta_error: likewise.
        """
        return self._epsilon(self._core, delta)

    @classmethod
    def mechanism(cls) -> str:
        """Returns "prv"."""
        return "prv"
