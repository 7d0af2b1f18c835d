"""The names of parameters without what wrappers put into them, so that noise and checkpoints do not depend on these.

wrapper                            what it puts before a name
DistributedDataParallel            module.
torch.compile                      _orig_mod.
checkpoint_wrapper                 _checkpoint_wrapped_module.
FullyShardedDataParallel           _fsdp_wrapped_module.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from privet.errors import ConfigurationError

__all__ = ["canonical", "canonical_names"]

_ALWAYS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def canonical(module: nn.Module, name: str) -> str:
    """Returns the name of something inside of a module, without what wrappers put into it."""
    kept = []
    at: object = module
    for part in name.split("."):
        # A module of the user's own may be called "module". Only that of a wrapper is left out.
        wraps = part in _ALWAYS or (part == "module" and isinstance(at, DistributedDataParallel))
        if not wraps:
            kept.append(part)
        at = getattr(at, part, None)
    return ".".join(kept)


def canonical_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Returns each name without what wrappers put into it, by the name with it.

    Raises:
        ConfigurationError: if two names become one.
    """
    found = {name: canonical(module, name) for name in names}
    if len(set(found.values())) < len(found):
        twice = sorted({each for each in found.values() if list(found.values()).count(each) > 1})
        raise ConfigurationError(
            f"two parameters have one name once wrappers are left out: {', '.join(twice)}. Expected a name of its own "
            "for each. Rename a part of the model."
        )
    return found
