"""What a model may not have, and what takes its place."""

from privet.opacus.validators import batch_norm, instance_norm, recurrent  # they register themselves
from privet.opacus.validators.module_validator import ModuleValidator
from privet.opacus.validators.utils import register_module_fixer, register_module_validator

__all__ = [
    "ModuleValidator",
    "batch_norm",
    "instance_norm",
    "recurrent",
    "register_module_fixer",
    "register_module_validator",
]
