"""The public surface is `__all__`: sorted, complete, importable, and the same from every side."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import tomllib
from pathlib import Path

import pytest

import privet

ROOT = Path(__file__).resolve().parent.parent
# A module whose library is not installed with the tests says so, and nothing else imports it.
ABSENT = {"privet.noise.fused_kernel"} if importlib.util.find_spec("triton") is None else set()
MODULES = sorted({module.name for module in pkgutil.walk_packages(privet.__path__, "privet.")} - ABSENT)


def in_order(name: str) -> tuple[int, str]:
    """Returns what to sort by: constants, then classes, then functions, as the linter does."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_every_top_level_name_loads_and_is_listed():
    for name in privet.__all__:
        assert getattr(privet, name).__module__.startswith("privet."), name
    assert set(privet.__all__) <= set(dir(privet))


def test_top_level_names_are_their_homes_names():
    for name, home in privet._HOMES.items():
        assert name in privet.__all__
        assert getattr(privet, name) is getattr(importlib.import_module(home), name)
        assert name in importlib.import_module(home).__all__, f"{home} does not list {name}"


def test_a_name_that_does_not_exist_is_an_attribute_error_that_lists_those_that_do():
    with pytest.raises(AttributeError, match=r"no attribute 'PrivacyEngin'.*PrivacyEngine"):
        _ = privet.PrivacyEngin  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["privet", *MODULES])
def test_the_surface_of_every_module_is_declared_and_sorted(name):
    module = importlib.import_module(name)
    if name.endswith("__main__"):
        return
    listed = module.__all__
    assert list(listed) == sorted(listed, key=in_order)
    assert len(set(listed)) == len(listed)
    missing = [each for each in listed if not hasattr(module, each)]
    assert not missing


@pytest.mark.parametrize("name", ["privet", *MODULES])
def test_what_a_module_defines_in_public_it_lists(name):
    if name.startswith("privet.cli."):
        return  # a command is public by its name on the command line
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    unlisted = defined - set(getattr(module, "__all__", ()))
    assert not unlisted, f"{name}: list them in __all__, or start their names with an underscore: {sorted(unlisted)}"


def test_the_version_is_the_distributions():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert privet.__version__ == declared


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "src" / "privet" / "py.typed").exists()
