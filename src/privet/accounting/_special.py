"""SciPy's special functions, loaded when the first one is used: an import of privet's accounting stays quick."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["log_binomial"]


def log_binomial(n: float, k: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns log |C(n, k)|; n may be fractional."""
    import scipy.special

    gammaln = scipy.special.gammaln
    return np.asarray(gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0), dtype=np.float64)


def __getattr__(name: str) -> Any:
    """Returns the function of that name from scipy.special, and keeps it for the next time."""
    if name.startswith("_"):
        raise AttributeError(name)
    import scipy.special

    value = getattr(scipy.special, name)
    globals()[name] = value
    return value
