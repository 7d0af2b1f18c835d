"""The errors of modules that cannot be trained privately, at Opacus's names."""

from __future__ import annotations

__all__ = [
    "IllegalModuleConfigurationError",
    "NotYetSupportedModuleError",
    "ShouldReplaceModuleError",
    "UnsupportableModuleError",
    "UnsupportedError",
    "UnsupportedModuleError",
]


class UnsupportedError(ValueError):
    """Something that cannot be trained privately."""


class UnsupportedModuleError(UnsupportedError):
    """A module that cannot be trained privately."""


class UnsupportableModuleError(UnsupportedModuleError):
    """A module for which there is no private replacement."""


class NotYetSupportedModuleError(UnsupportedModuleError):
    """A module that nothing here knows yet."""


class ShouldReplaceModuleError(UnsupportedModuleError):
    """A module that `ModuleValidator.fix` replaces."""


class IllegalModuleConfigurationError(UnsupportedModuleError):
    """A module in a state or with an option that cannot be trained privately."""
