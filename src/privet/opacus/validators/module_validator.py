"""Asks of every part of a module whether it can be trained privately, and replaces parts that cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from privet.opacus.modules import clone_module, trainable_modules
from privet.opacus.validators.errors import IllegalModuleConfigurationError, UnsupportedModuleError
from privet.validation import validate as core_issues

__all__ = ["ModuleValidator"]

logger = logging.getLogger(__name__)
_NO_PARAMETER = "has no trainable parameter"


class ModuleValidator:
    """Validators and fixers by class of module. A class of a module is met exactly, not by its bases."""

    VALIDATORS: ClassVar[dict[type, Callable[..., list[UnsupportedModuleError]]]] = {}
    FIXERS: ClassVar[dict[type, Callable[..., nn.Module]]] = {}

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[UnsupportedModuleError]:
        """Returns what keeps the module from being trained privately; raises it all in one if `strict`.

        Beside the registered validators, which are asked about parts with trainable parameters, the core looks at all
        parts: a batch norm mixes the examples of a batch also where its own parameters are frozen.
        """
        errors: list[UnsupportedModuleError] = []
        if not module.training:
            errors.append(IllegalModuleConfigurationError("the model is in eval mode. Call train() first."))
        asked: set[str] = set()
        for name, part in trainable_modules(module):
            validator = cls.VALIDATORS.get(type(part))
            if validator is not None:
                found = validator(part)
                asked.update({name} if found else ())
                errors.extend(found)
        errors.extend(
            IllegalModuleConfigurationError(str(issue))
            for issue in core_issues(module)
            if issue.path not in asked and _NO_PARAMETER not in issue.reason
        )
        if strict and errors:
            raise UnsupportedModuleError(errors)
        return errors

    @classmethod
    def is_valid(cls, module: nn.Module) -> bool:
        """Returns whether `validate` finds nothing."""
        return not cls.validate(module, strict=False)

    @classmethod
    def fix(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """Returns a copy of the module in which parts with a registered fixer are replaced.

        Args:
            module: the whole model, which stays as it is.
            **kwargs: for the fixers, such as `replace_bn_with_in` or `num_groups`.
        """
        copied = clone_module(module)
        for name, part in list(copied.named_modules()):
            fixer = cls.FIXERS.get(type(part))
            if fixer is None:
                continue
            replaced = fixer(part, **kwargs)
            held = next(part.parameters(), None)
            if held is not None:
                replaced.to(held.device)
            if replaced is part:
                continue
            logger.info("Replaced sub_module %s : %s with %s", name, part, replaced)
            if not name:
                return replaced
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, replaced)
        return copied

    @classmethod
    def fix_and_validate(cls, module: nn.Module, **kwargs: Any) -> nn.Module:
        """Returns the fixed module; raises UnsupportedModuleError if it cannot be trained privately even so."""
        fixed = cls.fix(module, **kwargs)
        cls.validate(fixed, strict=True)
        return fixed
