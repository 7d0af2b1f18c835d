"""Which parameters are private: exactly the optimizer's, which must be exactly the model's trainable ones."""

from __future__ import annotations

import torch
from torch import nn

from privet.errors import ConfigurationError
from privet.parallel.names import canonical_names

__all__ = ["private_parameters"]


def private_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by canonical name; a parameter with several names has its first.

    Raises:
        ConfigurationError: if the optimizer has parameters that the model lacks, or lacks trainable ones of the model,
            or the model has none.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    named = dict(module.named_parameters())
    ours = {id(p): name for name, p in named.items()}
    theirs = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    foreign = [p for key, p in theirs.items() if key not in ours]
    if foreign:
        shapes = ", ".join(str(tuple(p.shape)) for p in foreign)
        raise ConfigurationError(
            f"the optimizer holds {len(foreign)} parameters that are not the module's, of shapes {shapes}. Expected "
            "exactly the module's trainable parameters. Build the optimizer from module.parameters(), after any "
            "change or copy of the module, and before the first forward of a sharded one."
        )
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    left_out = [name for name, p in trainable.items() if id(p) not in theirs]
    if left_out:
        raise ConfigurationError(
            f"the optimizer lacks trainable parameters of the module: {', '.join(left_out)}. Expected all of them. Add "
            "them to the optimizer, or freeze them with requires_grad_(False). Several optimizers become one by "
            "privet.ChainedOptimizer(first, second)."
        )
    if not trainable:
        raise ConfigurationError(
            "the module has no trainable parameter. Expected at least one with requires_grad=True."
        )
    names = canonical_names(module, trainable)
    return {names[name]: p for name, p in trainable.items()}
