"""What an engine says of a model before it is made private: the same as `privet.validate`, where people look for it."""

from __future__ import annotations

from torch import nn

from privet.validation import Issue, get_compatible_module, validate

__all__ = ["AboutModels"]


class AboutModels:
    """Gives an engine the names that the paper has for looking at a model."""

    @staticmethod
    def validate(module: nn.Module) -> list[Issue]:
        """Returns everything in the module that cannot be trained privately, with what takes its place."""
        return validate(module)

    @staticmethod
    def is_compatible(module: nn.Module) -> bool:
        """Returns whether `validate` finds nothing."""
        return not validate(module)

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """Returns a copy of the module in which the offending layers are replaced."""
        return get_compatible_module(module)
