"""The cases, one file a family. Each file has a function `cases` that returns its own."""

from __future__ import annotations

import importlib.util
from importlib import import_module

from benchmarks.zoo.case import Case

__all__ = ["FAMILIES", "missing", "of_all"]

# The file, what it is called on the page, and the packages that it needs.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "causal": ("Causal language models", ("transformers",)),
    "experts": ("Mixtures of experts", ("transformers",)),
    "encoders": ("Encoders of text", ("transformers",)),
    "seq2seq": ("Sequence to sequence", ("transformers",)),
    "sound": ("Sound", ("transformers",)),
    "series": ("Time series", ("transformers",)),
    "vision": ("Vision, transformers", ("transformers",)),
    "adapters": ("PEFT", ("transformers", "peft")),
    "timms": ("Vision, timm", ("timm", "torchvision")),
    "diffusion": ("Diffusion", ("diffusers",)),
    "graphs": ("Graphs", ("torch_geometric",)),
    "by_hand": ("By hand", ()),
    "recurrent": ("Recurrent, by hand", ()),
    "checkpointing": ("Gradient checkpointing", ("transformers",)),
    "ways": ("Two passes, and padded steps", ("transformers",)),
    "bad_input": ("What is refused", ()),
}


def missing(case: Case) -> list[str]:
    """Returns the packages that a case needs and that are not installed."""
    return [name for name in case.needs if importlib.util.find_spec(name) is None]


def of_all(*families: str) -> list[Case]:
    """Returns the cases of these families, or of all, without importing what they need."""
    found = []
    for name in families or FAMILIES:
        title, needs = FAMILIES[name]
        found += [case.of(title, *needs) for case in import_module(f"benchmarks.zoo.families.{name}").cases()]
    return found
