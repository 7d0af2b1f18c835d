"""MODULE:FACTORY, as a user writes it: what the function of that name makes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from privet.errors import ConfigurationError

__all__ = ["made_by"]


def made_by(name: str) -> Any:
    """Returns what the factory of that name makes; its module is looked for in the folder of now as well.

    Raises:
        ConfigurationError: if there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigurationError(f"expected MODULE:FACTORY, such as mypackage.training:make_model, got {name!r}.")
    if "" not in sys.path and os.curdir not in sys.path:
        sys.path.insert(0, os.curdir)  # as `python -m` has it
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"there is no module {error.name!r} to import, from the folder of now.") from error
    except AttributeError as error:
        raise ConfigurationError(f"{module} has no {attribute!r}.") from error
    return factory()
