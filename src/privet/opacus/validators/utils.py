"""Registration of validators and fixers of your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from privet.opacus.validators.module_validator import ModuleValidator

__all__ = ["DEFAULT_MODULE_VALIDATOR", "register_module_fixer", "register_module_validator"]

DEFAULT_MODULE_VALIDATOR = ModuleValidator
F = TypeVar("F", bound=Callable[..., Any])


def _registered(targets: type | Sequence[type], table: dict[type, Any]) -> Callable[[F], F]:
    def register(function: F) -> F:
        table.update(dict.fromkeys(targets if isinstance(targets, Sequence) else [targets], function))
        return function

    return register


def register_module_validator(
    target_class_or_classes: type | Sequence[type], validator_class: type[ModuleValidator] = DEFAULT_MODULE_VALIDATOR
) -> Callable[[F], F]:
    """Returns a decorator that registers `validate(module) -> list of errors` for classes of modules."""
    return _registered(target_class_or_classes, validator_class.VALIDATORS)


def register_module_fixer(
    target_class_or_classes: type | Sequence[type], validator_class: type[ModuleValidator] = DEFAULT_MODULE_VALIDATOR
) -> Callable[[F], F]:
    """Returns a decorator that registers `fix(module, **kwargs) -> module` for classes of modules."""
    return _registered(target_class_or_classes, validator_class.FIXERS)
