"""What a model allows of which every forward needs all ranks, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from privet.errors import ConfigurationError
from privet.gradients.rules.custom import module_rule
from privet.gradients.spread import Spread
from privet.training.performance import Performance

__all__ = ["passes_of", "refuse_mode", "refuse_options", "refuse_rules", "refuse_search", "refuse_single_file"]


def passes_of(performance: Performance, spread: Spread, module: nn.Module, groups: Sequence[int]) -> Literal[1, 2]:
    """Returns how many backwards a step takes.

    Args:
        performance: the user's options.
        spread: of the model over processes.
        module: the model.
        groups: the clipping group of each parameter. Two backwards weigh each example once, for one group.
    """
    if performance.passes != "auto":
        return performance.passes
    return 2 if spread.collective and len(set(groups)) == 1 and _recomputes(module) else 1


def _recomputes(module: nn.Module) -> bool:
    """Returns whether a part of the module says that it recomputes activations, as torch's own wrapper does."""
    return any(
        getattr(child, "gradient_checkpointing", None) is True
        or any(kind.__name__ == "CheckpointWrapper" for kind in type(child).__mro__)
        for child in module.modules()
    )


def refuse_options(performance: Performance, spread: Spread) -> None:
    """Raises ConfigurationError for options of a step that a collective forward does not allow."""
    refuse_search("physical_batch_size", spread, search=performance.physical_batch_size == "auto")
    if spread.collective and performance.compile:
        raise ConfigurationError(
            "compile=True traces one graph, in which parameters that are gathered from other ranks are not seen. "
            "Expected compile=False for a sharded model."
        )


def refuse_search(name: str, spread: Spread, *, search: bool) -> None:
    """Raises ConfigurationError if a size is to be found by trying again."""
    if spread.collective and search:
        raise ConfigurationError(
            f"{name}='auto' tries a batch again on the process whose memory ran out, and every forward of a sharded "
            "model needs all ranks. Expected a number. Give one that fits on every rank."
        )


def refuse_mode(mode: str, spread: Spread) -> None:
    """Raises ConfigurationError for modes that show per-example gradients."""
    if spread.collective and mode != "auto":
        raise ConfigurationError(
            f"grad_sample_mode={mode!r} shows every example's whole gradient on the parameters, of which a rank of a "
            "sharded model holds a part. Expected grad_sample_mode='auto'."
        )


def refuse_rules(module: nn.Module, spread: Spread) -> None:
    """Raises ConfigurationError if a module has a rule of the user's own, which may look at its parameters."""
    found = [name for name, child in module.named_modules() if module_rule(child) is not None]
    if spread.collective and found:
        raise ConfigurationError(
            f"modules of a sharded model have rules of the user's own: {', '.join(found)}. Such a rule runs after the "
            "backward, when their parameters are in shards again. Expected none. Register a rule for a torch function, "
            "or remove the rule: operations without one work, only slower."
        )


def refuse_single_file(spread: Spread) -> None:
    """Raises ConfigurationError, as one file cannot hold what all ranks hold together."""
    if spread.collective:
        raise ConfigurationError(
            "a checkpoint in one file would hold the shards of one rank alone. Expected torch.distributed.checkpoint "
            "for a sharded model: save get_state_dict(model, optimizer) with it, and state_dict() of the engine or "
            "step, which has the ledger and the counters, beside it (docs/distributed.md)."
        )
