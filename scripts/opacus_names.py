"""Writes the table of Opacus's public names and what `privet.opacus` has at the same paths, as Markdown.

    python scripts/opacus_names.py > table.md

Both packages are imported: Opacus 1.6.0 has to be installed, for this script alone. Public are the names in the
`__all__` of a module, or else the classes and functions that it defines, none of them with an underscore in front.
"""

from __future__ import annotations

import datetime as dt
import importlib
import inspect
import pkgutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

SAFER = {
    "PrivacyEngine": "bills its steps itself, whatever hook is attached; a kept order is not billed as sampling",
    "GaussianAccountant": "an upper bound, where Opacus takes the central limit",
    "RDPAccountant": "the best of the same orders; infinite where there is no noise",
    "PRVAccountant": "an upper bound to its last digit, in place of a figure with a tolerance",
    "get_noise_multiplier": "never fewer steps than are taken",
    "DPDataLoader": "batches follow no global seed; empty ones have the structure of any other from the first on",
    "UniformWithReplacementSampler": "batches follow no global seed; 49 steps at 1/49",
    "DistributedUniformWithReplacementSampler": "an empty share is a step like any other, so that no process waits",
    "DPOptimizer": "noise follows no global seed; only what was clipped and noised reaches the wrapped optimizer",
    "DPOptimizerFastGradientClipping": "takes clipped sums of the criterion alone, never what lies in `p.grad`",
    "AdaClipDPOptimizer": "the count is centred and divided by a public number, as its theorem asks",
    "DPTensorFastGradientClipping": "losses of shape (B, 1) are not multiplied by everybody's clip factors",
    "GradSampleModule": "rows are held against autograd on the first batch; nothing is trained that was not captured",
    "GradSampleHooks": "rows are held against autograd on the first batch; nothing is trained that was not captured",
    "GradSampleModuleFastGradientClipping": "tied weights work; no gradient without privacy is left in `p.grad`",
    "GradSampleHooksFastGradientClipping": "tied weights work; no gradient without privacy is left in `p.grad`",
    "ModuleValidator": "refuses a batch norm whose own parameters are frozen or absent, too",
    "BatchMemoryManager": "a batch of which parts are missing is not billed as a sampled one",
    "register_grad_sampler": "the sampler is held against autograd on the first batch",
    "register_norm_sampler": "kept, and not called: a wrong norm would be a broken promise",
}
ABSENT = {
    "analysis": "the accounting is the core's: `privet.accounting`",
    "fsdp": "models that are split over processes train at privet's own door",
    "_tp": "models that are split over processes train at privet's own door",
    "FSDP": "models that are split over processes train at privet's own door",
    "TP": "models that are split over processes train at privet's own door",
    "adaptive_clipping": 'it adapts from norms without noise; use `clipping="adaptive"`',
    "DistributedPerLayerOptimizer": "it steps layers before all are billed; use `SimpleDistributedPerLayerOptimizer`",
    "dp_rnn": "the layers are torch's own, without cells",
    "embedding_norm_sample": "norms are the core's",
    "functorch": "vmap is the core's",
    "fast_gradient_clipping": "norms are the core's",
    "": "a helper of Opacus's own code",
}


def modules(package: str) -> Iterator[str]:
    """Yields the names of all modules of a package, tests left out."""
    yield package
    root = importlib.import_module(package)
    for found in pkgutil.walk_packages(root.__path__, package + "."):
        if ".tests" not in found.name:
            yield found.name


def public(module: ModuleType) -> list[str]:
    """Returns the public names of a module."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [
            name
            for name, value in vars(module).items()
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__
        ]
    return sorted(name for name in listed if not name.startswith("_") and hasattr(module, name))


def imported(name: str) -> ModuleType | None:
    """Returns a module, or None where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def required(value: Any) -> set[str]:
    """Returns the parameters that a caller may name."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes_anything(value: Any) -> bool:
    """Returns whether a callable takes any keyword."""
    try:
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return True


def row(module: str, name: str, theirs: Any) -> tuple[str, str]:
    """Returns the state of one name, and the reason."""
    ours = imported(f"privet.{module}")
    if ours is None or not hasattr(ours, name):
        where = f"{module}.{name}"
        return "absent", next(reason for part, reason in ABSENT.items() if part in where)
    mine = getattr(ours, name)
    missing = set() if takes_anything(mine) else required(theirs) - required(mine)
    if missing:
        return "same", f"without {', '.join(f'`{each}`' for each in sorted(missing))}"
    return ("safer", SAFER[name]) if name in SAFER else ("same", "")


def main() -> int:
    """Prints the table."""
    warnings.simplefilter("ignore")
    counted: Counter[str] = Counter()
    lines = []
    opacus = importlib.import_module("opacus")
    for module in sorted(modules("opacus")):
        theirs = imported(module)
        for name in [] if theirs is None else public(theirs):
            state, reason = row(module, name, getattr(theirs, name))
            counted[state] += 1
            lines.append(f"| `{module}.{name}` | {state} | {reason} |")
    states = ", ".join(f"{counted[state]} {state}" for state in ("same", "safer", "absent"))
    today = f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"
    print(f"Opacus {opacus.__version__}, torch {torch.__version__}, {today}: {states}.")
    print("\n| name in Opacus | here | how it differs |\n|---|---|---|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
