"""What an integration needs that privet itself does not: said in one line, with the extra that installs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

__all__ = ["need"]


def need(package: str, least: str, *, extra: str) -> None:
    """Raises ImportError, with what to install, unless the package is there in the version `least` or a newer one.

    Example:
        >>> need("torch", "1.0", extra="lightning")  # it is there
    """
    install = f"pip install 'privet[{extra}]'"
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"privet needs {package} {least} or newer here, and found none: {install}", name=package)
    found = getattr(importlib.import_module(package), "__version__", None) or importlib.metadata.version(package)
    if _numbers(found) < _numbers(least):
        raise ImportError(f"privet needs {package} {least} or newer here, and found {found}: {install}", name=package)


def _numbers(version: str) -> list[int]:
    """Returns major and minor number of a version such as "2.6.0.dev1"."""
    return [int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:2]]
