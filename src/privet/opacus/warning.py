"""The warning by which this package says where it does something safer than Opacus does."""

from __future__ import annotations

import warnings

__all__ = ["OpacusPrivacyWarning", "warn"]


class OpacusPrivacyWarning(UserWarning):
    """The same script under Opacus would have a weaker guarantee than it reports; here it does not."""


def warn(message: str) -> None:
    """Warns of one difference, with its reason."""
    warnings.warn(message, OpacusPrivacyWarning, stacklevel=3)
