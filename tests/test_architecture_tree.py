"""The laws that only several files together can break; each check is shown to see a planted violation."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.test_architecture import LEVELS, PRIVILEGES, SOURCE, imports, parts_of

LOOSE = 6
Tree = dict[str, str]
"""The source of modules by their paths below `privet`."""


def modules_imported(source: str, path: str, tree: Tree, *, late: bool) -> set[str]:
    """Returns the paths of the modules that a module imports by name; those in functions only if `late`."""
    parsed = ast.parse(source)
    functions = [n for n in ast.walk(parsed) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    deferred = {node.lineno for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)}
    found = set()
    for name, line in imports(parsed, path):
        if line in deferred and not late:
            continue
        parts = name.split(".")
        for length in range(len(parts), 1, -1):
            stem = "/".join(parts[1:length])
            home = next((p for p in (f"{stem}.py", f"{stem}/__init__.py") if p in tree), None)
            if parts[0] == "privet" and home:
                found.add(home)
                break
    return found - {path}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns a circle of a graph, said in words, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"a circle of imports: {' -> '.join(reversed(error.args[1]))}"]
    return []


def circles(tree: Tree) -> list[str]:
    """Returns circles between modules, imports for the type checker included, and between the parts of a package.

    A part is a module or a package. Between parts the imports inside functions count too, but for those between two
    modules of one package, which are how a module defers what is heavy.
    """
    broken = circle({path: modules_imported(source, path, tree, late=False) for path, source in tree.items()})
    parts: dict[tuple[str, ...], dict[str, set[str]]] = {}
    for path, source in tree.items():
        own, early = parts_of(path), modules_imported(source, path, tree, late=False)
        for target in modules_imported(source, path, tree, late=True):
            other = parts_of(target)
            depth = next(d for d in range(len(own)) if own[d] != other[d])
            both_modules = len(own) == len(other) == depth + 1
            if target in early or not both_modules:
                parts.setdefault(tuple(own[:depth]), {}).setdefault(own[depth], set()).add(other[depth])
    return broken + [line for graph in parts.values() for line in circle(graph)]


def holds_code(source: str) -> bool:
    """Returns whether a module has anything but a docstring, imports and its `__all__`."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        surface = any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (surface or text or isinstance(node, ast.Import | ast.ImportFrom)):
            return True
    return False


def empty_packages(tree: Tree) -> list[str]:
    """Returns the packages in which there is no code."""
    packages = {"/".join(path.split("/")[:depth]) for path in tree for depth in range(1, path.count("/") + 1)}
    full = {path for path, source in tree.items() if holds_code(source)}
    return [
        f"{package}/: no module of it holds code; delete it until one does"
        for package in sorted(packages)
        if not any(path.startswith(package + "/") for path in full)
    ]


def loose_modules(tree: Tree) -> list[str]:
    """Returns the modules at the top level if they are too many."""
    loose = sorted(path for path in tree if "/" not in path and path != "__init__.py")
    return [f"{len(loose)} loose modules, at most {LOOSE}: {', '.join(loose)}"] if len(loose) > LOOSE else []


def promised_in_vain(tree: Tree) -> list[str]:
    """Returns the layers and the holders of privileges that do not exist."""
    prefixes = {"/".join(parts_of(path)[:depth]) for path in tree for depth in range(1, path.count("/") + 2)}
    layers = [f"{package}/{name}".lstrip("/") for package, levels in LEVELS.items() for name in levels]
    holders = [holder for _, paths in PRIVILEGES.values() for holder in paths]
    return [f"{name} has a layer, and does not exist" for name in layers if name not in prefixes] + [
        f"{holder} has a privilege, and does not exist"
        for holder in holders
        if not any(path.startswith(holder) for path in tree)
    ]


def the_source() -> Tree:
    """Returns the whole tree."""
    return {file.relative_to(SOURCE).as_posix(): file.read_text() for file in sorted(SOURCE.rglob("*.py"))}


def test_the_source_keeps_the_laws_of_the_tree():
    tree = the_source()
    assert len(tree) > 5, "the check found next to nothing to look at"
    broken = circles(tree) + empty_packages(tree) + loose_modules(tree) + promised_in_vain(tree)
    assert not broken, "\n".join(["", *broken])


@pytest.mark.parametrize(
    ("check", "tree"),
    [
        (circles, {"a.py": "from privet.b import x", "b.py": "from privet import a"}),
        (circles, {"p/a.py": "from .b import x", "p/b.py": "from . import a"}),
        (circles, {"p/a.py": "from privet.p.b import x", "p/b.py": "if TYPE_CHECKING:\n    from privet.p.a import y"}),
        (circles, {"p/__init__.py": "from privet.p.a import x", "p/a.py": "from privet.p import y"}),
        (circles, {"a.py": "import privet.b", "b.py": "import privet.c", "c.py": "import privet.a"}),
        # No circle of modules, but one of packages.
        (circles, {"p/a.py": "import privet.q.a", "q/a.py": "x = 1", "q/b.py": "import privet.p.b", "p/b.py": ""}),
        (circles, {"p/a.py": "def f():\n    import privet.q.a", "q/a.py": "import privet.p.b", "p/b.py": ""}),
        (circles, {"p/a.py": "def f():\n    import privet.b", "b.py": "from privet.p.a import f"}),
        (circles, {"r/p/a.py": "def f():\n    import privet.r.b", "r/b.py": "async def g():\n    import privet.r.p.a"}),
        (empty_packages, {"p/__init__.py": "'''Doc.'''\nfrom privet.q import x\n__all__ = ['x']"}),
        (empty_packages, {"p/__init__.py": "__all__: list[str] = []", "p/a.py": "'''Later.'''"}),
        (empty_packages, {"p/__init__.py": "", "p/a.py": "x = 1", "p/q/__init__.py": ""}),
        (loose_modules, {f"{name}.py": "x = 1" for name in "abcdefg"}),
        (promised_in_vain, {"errors.py": "x = 1"}),
        (promised_in_vain, {path: s for path, s in the_source().items() if path != "gradients/capture/comparison.py"}),
        (promised_in_vain, {path: s for path, s in the_source().items() if path != "training/checkpoint.py"}),
    ],
)
def test_a_planted_violation_of_the_whole_tree_is_seen(check, tree):
    assert check(tree)


@pytest.mark.parametrize(
    ("check", "tree"),
    [
        (circles, {"a.py": "from privet.b import x", "b.py": "from privet.c import x", "c.py": ""}),
        (circles, {"p/a.py": "def f():\n    import privet.p.b", "p/b.py": "from privet.p.a import f"}),
        (
            circles,
            {"p/__init__.py": "from privet.p import a, b", "p/a.py": "x = 1", "p/b.py": "from privet.p.a import x"},
        ),
        (empty_packages, {"p/__init__.py": "'''Doc.'''", "p/q/__init__.py": "", "p/q/a.py": "x = 1"}),
        (loose_modules, {"__init__.py": "", **{f"{name}.py": "x = 1" for name in "abcdef"}, "p/a.py": "x = 1"}),
    ],
)
def test_a_tree_that_is_allowed_is_not_reported(check, tree):
    assert check(tree) == []
