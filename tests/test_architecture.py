"""The laws that one file can break, checked over the source; each check is shown to see a planted violation.

What only several files together can break is in `test_architecture_tree.py`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "privet"

# For each package with an order of its own (the empty name is `privet` itself), one line a layer, lowest first
# (docs/design.md, section 3). A module imports only from lines above its own. A package without an entry here has no
# order inside, and no circle either.
LAYERS = {
    "": (
        ("errors",),
        ("_checks",),
        ("accounting",),
        ("report", "tuning"),
        ("batches", "clipping"),
        ("gradients",),
        ("noise",),
        ("sampling",),
        ("parallel",),
        ("mechanism",),
        ("validation",),
        ("training",),
        ("schedules",),
        ("learning",),
        ("step",),
        ("engine",),
        ("audit",),
        ("integrations",),
        ("cli",),
        ("__main__",),
        ("opacus",),
    ),
    "gradients": (
        ("derived", "precision", "tracing", "turned"),
        ("layout",),
        ("isometries", "rows"),
        ("weight_norm",),
        ("use",),
        ("by_owner", "given", "rules"),
        ("clipped_sum", "weights"),
        ("units",),
        ("branch",),
        ("gathered",),
        ("reference", "summation"),
        ("spread",),
        ("capture",),
        ("passes",),
    ),
    "training": (
        (
            "accumulate",
            "clip_count",
            "divisor",
            "guard",
            "handed_over",
            "loaders",
            "loss_module",
            "memory",
            "models",
            "optimizers",
            "chained",
            "parameters",
            "performance",
            "plausible",
            "riding_ledger",
            "roles",
            "start",
            "statistics",
        ),
        ("accumulated_sum", "billing", "continuity", "criterion", "loggers", "logical_sum", "once"),
        ("collective", "update"),
        ("whose",),
        ("by_parts", "checkpoint", "loss_scale", "materialised", "several", "thawed", "virtual_steps", "way"),
        ("door", "private_module"),
        ("module_door",),
        ("options",),
        ("target",),
    ),
}
LEVELS = {
    package: {name: level for level, line in enumerate(lines) for name in line} for package, lines in LAYERS.items()
}
FORBIDDEN = {
    ("accounting", "torch"): "accounting/ is usable without torch",
    ("report", "torch"): "report/ is usable without torch",
    ("tuning", "torch"): "tuning/ is usable without torch",
    ("gradients", "privet.accounting"): "gradients/ knows nothing of accounting",
    ("clipping", "privet.accounting"): "clipping/ knows nothing of accounting",
}

# One writer per privilege: what is matched in the code, and the paths that may.
INTERCEPTION = {"__torch_function__", "__torch_dispatch__", "TorchFunctionMode", "TorchDispatchMode"}
HOOKS = {
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_hook",
    "register_module_forward_hook",
    "register_multi_grad_hook",
    "register_post_accumulate_grad_hook",
    "saved_tensors_hooks",
}
DRAWING = {
    "SystemRandom",
    "bernoulli",
    "bernoulli_",
    "cauchy_",
    "default_rng",
    "exponential_",
    "geometric_",
    "getrandbits",
    "log_normal_",
    "multinomial",
    "normal_",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "random_",
    "randperm",
    "token_bytes",
    "uniform_",
    "urandom",
}
PRIVILEGES = {
    "intercepts operations": (
        INTERCEPTION,
        ("gradients/capture/watched.py", "gradients/capture/moved.py", "gradients/capture/drawn.py"),  # a check's mode
    ),
    "hooks modules and gradients": (
        HOOKS,
        ("gradients/capture/", "audit/"),  # an audit looks at a training from outside, as its user could
    ),
    # Opacus's names are of processes that each add up what the first one's noise was added to.
    "talks to other ranks": ({"torch.distributed", "distributed"}, ("parallel/", "opacus/")),
    # The slices of ranks, each of which is private, become one gradient: nowhere else is one made of other values.
    "puts private gradients together": ({"assembled"}, ("noise/", "parallel/")),
    # Checks ask gradients random questions, and an audit tosses coins; nothing of what they draw protects.
    # A selection draws how many trials there are.
    "draws randomness": (
        DRAWING,
        (
            *("noise/", "sampling/", "audit/", "tuning/select.py"),
            *("gradients/capture/comparison.py", "gradients/capture/other_values.py"),
            "learning/views.py",  # where pictures are cut out
            # Values of a new layer, made-up examples, sequences for tests, and who trains on which part of the data.
            *("opacus/layers/", "opacus/empty_batch.py", "opacus/utils/packed_sequences.py", "opacus/samplers.py"),
        ),
    ),
    "prints": ({"print", "rich", "pprint", "stdout"}, ("cli/",)),
}
LONGEST = 400
CAPTURES = {"capture", "_capture"}
"""What objects that intercept operations are called."""


def parts_of(path: str) -> list[str]:
    """Returns the names below `privet` of a path relative to it: a module's own last, `__init__` for a package's."""
    return path.removesuffix(".py").split("/")


def imports(tree: ast.Module, path: str) -> list[tuple[str, int]]:
    """Returns (absolute dotted name, line) of everything imported, those for the type checker alone included."""
    package = ["privet", *path.split("/")[:-1]]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def homeless(path: str) -> list[str]:
    """Returns the path if a package above it has an order, and no line in it for what holds the module."""
    parts = parts_of(path)
    return [
        f"{path}: {name} has no layer; give it a line in LAYERS and in docs/design.md, section 3"
        for depth, name in enumerate(parts)
        if name != "__init__" and name not in LEVELS.get("/".join(parts[:depth]), {name: 0})
    ]


def against_the_order(own: list[str], other: list[str]) -> str | None:
    """Returns what is wrong with an import between two paths of names below `privet`, or None."""
    depth = 0
    while depth < min(len(own), len(other)) and own[depth] == other[depth]:
        depth += 1
    levels = LEVELS.get("/".join(own[:depth]))
    if levels is None or depth == len(own) or own[depth] == "__init__":
        return None
    if depth == len(other) or other[depth] not in levels:
        return "through the package's front; import it from its home"
    if levels[other[depth]] >= levels[own[depth]]:
        return f"which is not above {own[depth]}"
    return None


def direction(tree: ast.Module, path: str) -> list[str]:
    """Returns the imports that run against the layers."""
    own = parts_of(path)
    if own == ["__init__"]:
        return []
    if broken := homeless(path):
        return broken
    for name, line in imports(tree, path):
        for (who, what), reason in FORBIDDEN.items():
            if own[0] == who and (name == what or name.startswith(what + ".")):
                broken.append(f"{path}:{line}: imports {name}; {reason}")
        first, *other = name.split(".")
        if first == "privet" and (wrong := against_the_order(own, other)):
            broken.append(f"{path}:{line}: imports {name}, {wrong}")
    return broken


def names(tree: ast.Module, path: str) -> list[tuple[str, int]]:
    """Returns every name that the code uses, defines or imports, with its line. Strings and comments do not count."""
    found = imports(tree, path)
    found += [(part, line) for name, line in found for part in name.split(".")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append((node.id, node.lineno))
        elif isinstance(node, ast.Attribute):
            found.append((node.attr, node.lineno))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node.name, node.lineno))
    return found


def privileges(tree: ast.Module, path: str) -> list[str]:
    """Returns the uses of a privilege by someone who does not hold it."""
    broken = []
    for what, (marks, holders) in PRIVILEGES.items():
        if not path.startswith(holders):
            broken += [
                f"{path}:{line}: `{name}`: only {' and '.join(holders) or 'nobody'} {what}"
                for name, line in sorted(set(names(tree, path)), key=lambda found: found[1])
                if name in marks
            ]
    return broken


def written_from_outside(tree: ast.Module, path: str) -> list[str]:
    """Returns the assignments to an attribute of something called `capture`, or of a part of it: it is asked instead.

    What a forward and its backward need is handed in when they begin (`Capture.begin`). Fields that other files set and
    put back would have to be right in every order, after errors and interrupts too.
    """
    broken = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store | ast.Del):
            continue
        owner = node.value
        while isinstance(owner, ast.Attribute) and owner.attr not in CAPTURES:
            owner = owner.value
        if getattr(owner, "attr", getattr(owner, "id", None)) in CAPTURES:
            broken.append(f"{path}:{node.lineno}: sets {ast.unparse(node)}; call a method of it")
    return broken


def length(source: str, path: str) -> list[str]:
    """Returns the file if it is too long for one idea."""
    lines = source.count("\n")
    return [f"{path}: {lines} lines; one idea is at most {LONGEST}"] if lines > LONGEST else []


def violations(source: str, path: str) -> list[str]:
    """Returns everything that one file, given by its path below `privet`, breaks."""
    tree = ast.parse(source)
    return direction(tree, path) + privileges(tree, path) + written_from_outside(tree, path) + length(source, path)


def test_the_source_keeps_every_law():
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 5, "the check found next to nothing to look at"
    broken = [line for file in files for line in violations(file.read_text(), file.relative_to(SOURCE).as_posix())]
    assert not broken, "\n".join(["", *broken])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gradients/use.py", "from privet.accounting import ledger"),
        ("gradients/use.py", "from privet.noise.gaussian import Gaussian"),
        ("gradients/rules/linear.py", "from ...engine import PrivacyEngine"),
        ("gradients/__init__.py", "from privet.noise import NoiseKey"),
        ("gradients/use.py", "def late():\n    import privet.engine"),
        ("clipping/flat.py", "from privet import Poisson"),
        ("accounting/pld.py", "import torch"),
        ("report/facts.py", "import torch"),
        ("report/facts.py", "import privet.tuning"),
        ("tuning/runs.py", "import torch"),
        ("tuning/runs.py", "from random import SystemRandom"),
        ("report/facts.py", "from privet.engine import PrivacyEngine"),
        ("accounting/pld.py", "from torch import Tensor"),
        ("accounting/pld.py", "if TYPE_CHECKING:\n    import torch.nn"),
        ("noise/source.py", "from ..step import PrivateStep"),
        ("invented/new.py", "x = 1"),
        ("engine.py", "model.register_forward_hook(f)"),
        ("noise/gaussian.py", "p.register_post_accumulate_grad_hook(f)"),
        ("gradients/use.py", "from privet.gradients.rules.registry import Call"),
        ("gradients/use.py", "if TYPE_CHECKING:\n    from privet.gradients.rules.registry import Call"),
        ("gradients/rules/linear.py", "from privet.gradients.summation import clipped_sum"),
        ("gradients/rules/linear.py", "from ..capture.capture import Capture"),
        ("gradients/summation.py", "from privet.gradients.capture.capture import Capture"),
        ("gradients/summation.py", "from privet.gradients import Capture"),
        ("gradients/summation.py", "import privet.gradients"),
        ("gradients/capture/coverage.py", "def late():\n    from privet.gradients.passes.role import Losses"),
        ("gradients/invented.py", "x = 1"),
        ("gradients/invented/__init__.py", "x = 1"),
        ("training/optimizers.py", "from privet.training.update import update_of"),
        ("training/checkpoint.py", "from privet.training.virtual_steps import BatchMemoryManager"),
        ("gradients/capture/instrument.py", "class Mode(TorchFunctionMode): ..."),
        ("gradients/rules/linear.py", "model.register_forward_hook(f)"),
        ("step.py", "class Mode:\n    def __torch_function__(self): ..."),
        ("step.py", "import torch.distributed as dist"),
        ("noise/gaussian.py", "from torch import distributed"),
        ("engine.py", "torch.distributed.all_reduce(x)"),
        ("training/update.py", "from privet.parallel.role import Ranks\nimport torch.distributed as dist"),
        ("training/update.py", "gradient = private.assembled(values)"),
        ("sampling/loader.py", "from privet.parallel.role import Ranks"),
        ("noise/gaussian.py", "from privet.parallel.reduction import Reduced"),
        ("gradients/clipped_sum.py", "x = torch.randn(3)"),
        ("engine.py", "p.normal_()"),
        ("clipping/adaptive.py", "import os\nkey = os.urandom(16)"),
        ("engine.py", "print('epsilon')"),
        ("mechanism.py", "from rich import progress"),
        ("step.py", "import sys\nsys.stdout.write('x')"),
        ("step.py", "x = 1\n" * (LONGEST + 1)),
        ("engine.py", "instrument.capture.on_use = f"),
        ("gradients/passes/one_pass.py", "before, self._capture.sink = self._capture.sink, f"),
        ("gradients/capture/coverage.py", "capture.layouts.known = {}"),
        ("gradients/capture/coverage.py", "capture.depth += 1"),
        ("step.py", "del self._capture.cycle"),
    ],
)
def test_a_planted_violation_is_seen(path, source):
    assert violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("step.py", "from privet.gradients.capture.capture import Capture\nfrom privet.errors import ProtocolError"),
        ("gradients/rules/linear.py", "from ..use import Use\nfrom privet.gradients.rules.registry import Rule"),
        ("gradients/capture/tripwire.py", "parameter.register_post_accumulate_grad_hook(f)"),
        ("gradients/capture/watched.py", "class Capture(TorchFunctionMode):\n    def __torch_function__(self): ..."),
        ("noise/secure.py", "key = os.urandom(32)"),
        ("sampling/poisson.py", "torch.rand(3)"),
        ("parallel/reduction.py", "import torch.distributed as dist\nprivate = own.assembled(values)"),
        (
            "gradients/__init__.py",
            "from privet.gradients import rules\nfrom privet.gradients.passes.role import Losses",
        ),
        ("gradients/passes/one_pass.py", "from privet.gradients.capture.capture import Capture"),
        ("training/update.py", "from privet.training.logical_sum import LogicalSum"),
        ("cli/main.py", "print('epsilon')"),
        ("engine.py", "'''Never print, never torch.randn.'''\noptimizer.register_step_pre_hook(f)"),
        ("accounting/pld.py", "import numpy\nfrom scipy import special"),
        ("step.py", "self._capture = Capture(p)\nself._capture.begin(n, sink)\nx.count = capture.layouts.learned"),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert violations(source, path) == []


def loaded_after(statement: str) -> set[str]:
    """Returns the modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    environment = {"PYTHONPATH": str(SOURCE.parent), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return set(run.stdout.split())


def test_accounting_loads_neither_torch_nor_the_heavy_parts_of_scipy():
    loaded = loaded_after("import privet.accounting")
    assert "privet.accounting" in loaded
    heavy = {"torch", "scipy.optimize", "scipy.signal", "scipy.stats", "scipy.sparse", "matplotlib", "rich"}
    assert not heavy & loaded


def test_the_package_itself_loads_nothing_heavy_until_a_name_is_used():
    assert not {"torch", "numpy", "scipy"} & loaded_after("import privet; dir(privet)")


def test_the_check_of_loaded_modules_can_fail():
    assert "torch" in loaded_after("import privet.errors, torch")
